"""Chat templates in the styles that published models have, written for these tests; with and without marks."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's and SmolLM's way."""

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "<|eot|>{% endgeneration %}{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
"""Llama 3's way: a beginning token, nothing between turns, texts trimmed, calls of tools in the turn."""

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<|turn|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|/turn|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|/turn|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
"""Gemma's way: no system role, the assistant is the model."""

FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen 3's way: the reasoning of earlier answers is left out."""

PLAIN = (
    "{% for m in messages %}### {{ m.role }}:\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
"""Alpaca's way: no special token at all."""

SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<|inst|>"
    "{{ system ~ '\n' if system and loop.revindex <= 2 }}{{ m.content }}<|/inst|>"
    "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
"""Mistral's way: the system turn stands before the last question; no opening."""

STYLES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "no-system": NO_SYSTEM,
    "forgets": FORGETS,
    "plain": PLAIN,
    "system-last": SYSTEM_LAST,
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|turn|>", "<|/turn|>"]
SPECIAL += ["<|inst|>", "<|/inst|>"]


def without_marks(template: str) -> str:
    """The same template as it was before `{% generation %}` was invented."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
