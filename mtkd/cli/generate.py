"""`mtkd generate`: look at what models of a run write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from mtkd.cli.show import print_json
from mtkd.errors import UserError


def generate(
    where: Annotated[Path, typer.Argument(help="RUN, RUN/STAGE or RUN/STAGE/MEMBER", metavar="RUN/STAGE")],
    prompt: Annotated[list[str], typer.Argument(help="what the answer is to follow", metavar="PROMPT")],
    teachers: Annotated[bool, typer.Option("--teachers", help="have the stage's teachers answer, too")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="most tokens of an answer")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the most probable token; above: draws")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="draw from the most probable tokens with this mass")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="of the draws")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Have a finished model of a run answer PROMPT; without a stage the last student."""
    from mtkd.config import AnswersConfig

    try:
        how = AnswersConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(message, where=option, found=first["input"]) from None
    from mtkd.running.ask import ask

    answers = ask(where, prompt, how, teachers=teachers, seed=seed)
    if as_json:
        print_json([vars(answer) for answer in answers])
        return
    several = len({answer.model for answer in answers}) > 1
    for answer in answers:
        end = " [cut]" if answer.cut else ""
        typer.echo(f"{answer.model}: {answer.text}{end}" if several else f"{answer.text}{end}")
