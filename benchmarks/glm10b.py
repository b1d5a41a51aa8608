"""A GLM of the full 10B shape fills a teacher cache on one small machine, streamed from disk layer by layer.

    python benchmarks/glm10b.py --folder FOLDER                   # makes 20 GB of shards there, runs, deletes them
    python benchmarks/glm10b.py --folder FOLDER --keep            # keeps them; a later call goes on from what is there
    python benchmarks/glm10b.py --folder FOLDER --layers 2 --width 64 --heads 4     # to see that all runs

The weights are random (normal, as large as fresh ones), in bf16, one in memory at a time, the same for a seed. The run
is an ordinary `mtkd run` of one `kind: cache` stage with `backend: streamed` over texts of random tokens, in a process
of its own. A sweep is one reading of all weights, for one batch. Printed for each number of tokens per sweep: seconds,
tokens per second, bytes read from the disk, and the peak of the resident set (VmHWM of /proc/PID/status: anonymous,
file and shared pages), which must stay below 6 GB. With `--cold` the shards leave the page cache first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from tokenizers.pre_tokenizers import ByteLevel

from mtkd.errors import DataError, UserError
from mtkd.models.cards import load_cards
from mtkd.models.folder import INDEX
from mtkd.models.glm import GLMConfig, gpt2_tokenizer
from mtkd.models.glm.names import Stored, our_names, shapes_wanted
from mtkd.models.glm.shards import num_bytes, write_shards

ALLOWED = 6e9
"""Bytes of resident memory that the run may take at most."""
LAYERS_PER_SHARD = 5
"""Of the full shape: 2 GB."""
BESIDE = 200_000_000
"""Bytes for the cache, the tokenizer and the run folder."""
STD = 0.02


def main() -> None:
    options = arguments()
    folder = options.folder / "glm"
    config = shape(options)
    try:
        make_model(folder, config, options.ids, options.seed)
        for tokens in options.sweeps:
            report(options, tokens, measure(options, tokens))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.Namespace:
    card = load_cards()["glm-10b"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with 20 GB free")
    parser.add_argument("--layers", type=int, default=card.layers)
    parser.add_argument("--width", type=int, default=card.width)
    parser.add_argument("--heads", type=int, default=card.heads)
    parser.add_argument(
        "--ids", type=int, default=50_257, help="of the plain vocabulary; GLM's commands come behind it"
    )
    parser.add_argument("--texts", type=int, default=4, help="of the cache")
    parser.add_argument("--length", type=int, default=128, help="tokens per text")
    parser.add_argument(
        "--sweeps", type=int, nargs="+", default=[512], help="tokens that share one reading of the weights"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--backend", choices=("streamed", "resident", "offload"), default="streamed", help="to compare")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def shape(options: argparse.Namespace) -> GLMConfig:
    return GLMConfig(
        vocab_size=-(-(options.ids + 9) // 128) * 128,  # nine commands, padded as the published vocabularies are
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=1024,
        architectures=["GLMForConditionalGeneration"],
        dtype="bfloat16",
    )


def make_model(folder: Path, config: GLMConfig, num_ids: int, seed: int) -> None:
    """Shards, index, configuration and tokenizer; shards that are there already are kept.

    Args: num_ids: of the plain vocabulary.
    Raises:
        DataError: the disk is too small.
    """
    weights = random_weights(config, seed)
    groups = shards(config)
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    origin = {**json.loads(config.to_json_string(use_diff=False)), "seed": seed}
    note = folder / "made_of.json"
    if folder.is_dir() and (not note.is_file() or json.loads(note.read_text()) != origin):
        raise UserError(
            "the folder holds something else", where=str(folder), todo="delete it, or give another --folder"
        )
    missing = [(file, names) for file, names in zip(files, groups, strict=True) if not (folder / file).is_file()]
    needed = sum(num_bytes(weights[name]) for _, names in missing for name in names)
    check_room(folder, needed + BESIDE)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(origin))
    for file, names in missing:
        begun = time.monotonic()
        part = folder / ".part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_shards(part, {name: weights[name] for name in names}, shard_bytes=1 << 62)
        os.replace(part / "model.safetensors", folder / file)
        part.rmdir()
        print(f"{file}: {(folder / file).stat().st_size / 1e9:.2f} GB in {time.monotonic() - begun:.0f} s", flush=True)
    places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    total = sum(num_bytes(weight) for weight in weights.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    write_tokenizer(folder, num_ids)
    config.save_pretrained(folder)


def check_room(folder: Path, needed: int) -> None:
    """Refuse a disk without room for `needed` bytes.

    Raises:
        DataError: with the bytes that are needed and free.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(
            "the disk has no room for the model",
            where=str(there),
            found=f"{free:,} bytes free",
            allowed=f"at least {needed:,} bytes",
            todo="make room, or give --folder on another disk; shards that are written already are kept",
        )


def shards(config: GLMConfig) -> list[list[str]]:
    """Names of the weights by file: the tables, then some layers each, the last normalisation with the last ones."""
    names = our_names(config.num_hidden_layers)
    by_layer = [[n for n in names if n.startswith(f"glm.layers.{i}.")] for i in range(config.num_hidden_layers)]
    tables = [n for n in names if "embeddings" in n]
    last = [n for n in names if n.startswith("glm.final")]
    blocks = [by_layer[i : i + LAYERS_PER_SHARD] for i in range(0, len(by_layer), LAYERS_PER_SHARD)]
    groups = [tables, *([name for layer in block for name in layer] for block in blocks)]
    groups[-1] += last
    return groups


def random_weights(config: GLMConfig, seed: int) -> dict[str, Stored]:
    """Every weight, made when it is asked for: norms are the identity, biases 0, the rest is normal."""
    shapes = shapes_wanted(
        {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "intermediate": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "positions": config.max_position_embeddings,
        }
    )

    def values(name: str) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros(shapes[name], dtype=torch.bfloat16)
        if "layernorm" in name:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
        std = STD / (2 * config.num_hidden_layers) ** 0.5 if residual else STD
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, std, generator=generator)

    return {name: Stored(size, torch.bfloat16, lambda name=name: values(name)) for name, size in shapes.items()}


def write_tokenizer(folder: Path, size: int) -> None:
    """GLM's tokenizer over a byte-level vocabulary of made-up words."""
    space = ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    known = [*sorted(ByteLevel.alphabet()), f"{space}a"]  # the source's texts are rows of "a", one token each
    tokens = [*known, *(f"w{i:06d}" for i in range(size - len(known) - 1)), "<|endoftext|>"]
    plain = folder / ".plain"
    plain.mkdir(exist_ok=True)
    (plain / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (plain / "merges.txt").write_text(f"#version: 0.2\n{space} a\n")
    gpt2_tokenizer(plain / "vocab.json", plain / "merges.txt").save_pretrained(folder)
    shutil.rmtree(plain)


def measure(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """One run in a process of its own, and what it took."""
    out = options.folder / "runs"
    shutil.rmtree(out, ignore_errors=True)
    file = options.folder / "glm10b.yaml"
    file.write_text(yaml.safe_dump(run_values(options, tokens, out)))
    if options.cold:
        evict(options.folder / "glm")
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mtkd", "run", str(file)], stdout=subprocess.DEVNULL)
    seen = {"peak": 0.0, "anonymous": 0.0, "file": 0.0, "read": 0.0}
    for values in watched(process):
        seen = {key: max(value, values.get(key, 0.0)) for key, value in seen.items()}
    if process.returncode:
        raise SystemExit(process.returncode)
    record = json.loads(next(out.glob("*/stages/*/DONE")).read_text())
    (facts,) = record["caches"].values()
    seen["peak"] = max(seen["peak"], record["peak_memory_bytes"])
    return {
        **seen,
        "wall": time.monotonic() - begun,
        "seconds": record["seconds"],
        "tokens": facts["positions"] + facts["examples"],  # a text's last token has no target
        "positions": facts["positions"],
        "bytes_per_position": facts["bytes_per_position"],
    }


def run_values(options: argparse.Namespace, tokens: int, out: Path) -> dict[str, object]:
    teacher = {"name": "glm", "model": str(options.folder.absolute() / "glm"), "backend": options.backend}
    texts = {"source": "random-tokens", "documents": options.texts, "max_length": options.length}
    cache = {"kind": "cache", "teachers": [teacher], "cache": {"k": 50}, "batch": {"tokens": tokens}}
    engine = {"kind": "torch", "device": "cpu", "precision": options.precision, "threads": options.threads}
    return {
        "name": "glm10b",
        "output": str(out),
        "data": {"texts": texts},
        "engine": engine,
        "stages": {"cache": cache},
    }


def watched(process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """Memory and bytes read of a process, several times a second until it ends."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            counters = Path(f"/proc/{process.pid}/io").read_text()
        except OSError:
            continue
        kilobytes = {n: float(v.split()[0]) * 1024 for n, v in fields(status) if v.strip().endswith("kB")}
        read = dict(fields(counters)).get("read_bytes", "0")
        names = {"peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}
        yield {**{key: kilobytes.get(name, 0.0) for key, name in names.items()}, "read": float(read)}
        time.sleep(0.05)


def fields(text: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (line.partition(":") for line in text.splitlines())]


def evict(folder: Path) -> None:
    """Put the shards out of the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def report(options: argparse.Namespace, tokens: int, found: dict[str, float]) -> None:
    print(
        f"{options.backend}, {options.precision}, {tokens} tokens per sweep: {found['tokens']:.0f} tokens in "
        f"{found['seconds']:.1f} s ({found['tokens'] / found['seconds']:.2f} per s), {found['wall']:.1f} s with start "
        f"and verification; {found['read'] / 1e9:.1f} GB read from disk; peak resident {found['peak'] / 1e9:.2f} GB "
        f"(largest seen: anonymous {found['anonymous'] / 1e9:.2f}, file {found['file'] / 1e9:.2f}); "
        f"{found['positions']:.0f} cached positions of {found['bytes_per_position']:.0f} bytes",
        flush=True,
    )
    if options.backend == "streamed" and found["peak"] >= ALLOWED:
        raise SystemExit(f"the resident set came to {found['peak'] / 1e9:.2f} GB, allowed are {ALLOWED / 1e9:.0f} GB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
