"""`handmill convert`: a Hugging Face checkpoint, or a GGUF file of floats, to a quantized GGUF file."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UsageError
from models.text import human_bytes, human_count, printable

if TYPE_CHECKING:
    from convert.file_types import FileType
    from convert.placement import ConversionReport, FilePlan, Progress

HELP = "convert a checkpoint, or a GGUF file, to a quantized GGUF file"
ORDER = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", help="a checkpoint directory, a GGUF file, or owner/name on the hub"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the file to write (default: in the library)"
    )
    kind = parser.add_argument(
        "-t", "--type", metavar="TYPE", help="the file type (default Q4_K_M; 'list' shows them)"
    )
    kind.completer = _complete_type  # type: ignore[attr-defined]  # read by argcomplete
    parser.add_argument(
        "--split-size",
        type=_decimal_size,
        metavar="SIZE",
        help="write parts of at most SIZE bytes of tensors: 4G, 500M (powers of 1000)",
    )
    parser.add_argument(
        "--requantize", action="store_true", help="take a GGUF file that is quantized already, at a loss"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the final size, write nothing")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")
    parser.add_argument("--no-check", action="store_true", help="do not try the file before it is called done")
    parser.add_argument("--base", metavar="CHECKPOINT", help="the checkpoint that SOURCE, a LoRA adapter, belongs to")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the model of --base")
    parser.add_argument(
        "--ignore-field",
        metavar="NAME",
        action="append",
        default=[],
        help="a field of config.json that is not known, and changes nothing; may be given several times",
    )
    parser.add_argument("-j", "--threads", type=int, metavar="N", help="threads that encode (default: every core)")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no report")


def run(args: argparse.Namespace) -> int:
    if args.type == "list":
        _print_types()
        return 0
    from convert.file_types import DEFAULT, file_type

    if args.source is None:
        raise UsageError(
            "convert what?",
            hint="handmill convert SOURCE: a checkpoint directory, a GGUF file, or owner/name on the hub.",
        )
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: there must be one at least")
    kind = file_type(args.type) if args.type else None  # before anything is fetched
    if Path(args.source).is_file() or args.source.lower().endswith(".gguf"):
        return _convert_gguf(args, Path(args.source), kind or DEFAULT)
    if args.requantize:
        raise UsageError(f"{printable(args.source)} is no GGUF file, which --requantize is for")
    from convert.converter import convert_checkpoint, plan_conversion
    from runner.cli.resolve import checkpoint_source, remember_conversion

    source, name, named_type = checkpoint_source(args.source, args.quiet)
    adapter = _adapter(args, source)
    if adapter is not None:
        source, base_name, named_type = checkpoint_source(args.base, args.quiet)
        if not args.merge:
            return _convert_adapter(args, adapter, source, name)
        name = f"{base_name}-{name}"
    kind = kind or file_type(named_type or DEFAULT.name)
    if args.dry_run:
        plan = plan_conversion(
            source, kind, ignored_fields=args.ignore_field, adapter=adapter, split_size=args.split_size
        )
        _print_plan(plan, as_json=args.json)
        return 0
    output = args.output or _library_place(name, kind)
    with _progress(args) as progress:
        report = convert_checkpoint(
            source,
            output,
            kind,
            force=args.force,
            check=not args.no_check,
            threads=args.threads,
            ignored_fields=args.ignore_field,
            adapter=adapter,
            split_size=args.split_size,
            progress=progress,
        )
    if adapter is None:
        remember_conversion(source, kind.name, report.path)
    _print_report(report, as_json=args.json, quiet=args.quiet)
    return 0


def _convert_gguf(args: argparse.Namespace, source: Path, kind: FileType) -> int:
    from convert.gguf_source import convert_gguf, plan_gguf

    for option, given in (("--base", args.base), ("--merge", args.merge), ("--ignore-field", args.ignore_field)):
        if given:
            raise UsageError(f"{option} is for checkpoints, and {printable(source)} is a GGUF file")
    if args.dry_run:
        plan = plan_gguf(source, kind, requantize=args.requantize, split_size=args.split_size)
        _print_plan(plan, as_json=args.json)
        return 0
    output = args.output or _library_place(_without_type(source), kind)
    with _progress(args) as progress:
        report = convert_gguf(
            source,
            output,
            kind,
            force=args.force,
            check=not args.no_check,
            threads=args.threads,
            requantize=args.requantize,
            split_size=args.split_size,
            progress=progress,
        )
    _print_report(report, as_json=args.json, quiet=args.quiet)
    return 0


def _without_type(source: Path) -> str:
    """`Qwen2-0.5B` for `Qwen2-0.5B-f16.gguf` or its parts."""
    from convert.file_types import FILE_TYPES
    from models.gguf_parts import split_name

    part = split_name(source.stem)
    name = part[0] if part else source.stem
    kind = next((name[-len(kind) :] for kind in FILE_TYPES if name.upper().endswith(("-" + kind, "." + kind))), "")
    return name[: -len(kind) - 1] or name if kind else name


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Progress]:
    from runner.cli.progress import ProgressLine

    with ProgressLine(args.quiet) as line:
        yield lambda stage, done, total: line.show(stage, done, total, human_bytes)


def _decimal_size(text: str) -> int:
    """An argparse type: bytes, as `4G` or `500M`; the letters are powers of 1000, as in llama.cpp's gguf-split."""
    match = re.fullmatch(r"(\d{1,12})([KMG])?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 4G or 500M")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[(match[2] or "").upper()]


def _adapter(args: argparse.Namespace, source: Path) -> Path | None:
    """SOURCE, if it is a LoRA adapter. Raises UsageError where the options do not go with what it is."""
    from convert.lora import is_adapter

    if not is_adapter(source):
        if args.base or args.merge:
            raise UsageError(f"{source} is no LoRA adapter, which --base and --merge are for")
        return None
    if not args.base:
        raise UsageError(
            f"{source} is a LoRA adapter", hint="Name the checkpoint it belongs to: --base CHECKPOINT (and --merge)."
        )
    return source


def _convert_adapter(args: argparse.Namespace, adapter: Path, base: Path, name: str) -> int:
    from convert.adapter import convert_adapter
    from convert.pipeline import available_cores
    from convert.quantize import tensor_type

    kind = (args.type or "F32").upper()
    if kind not in ("F32", "F16", "BF16", "Q8_0"):
        raise UsageError(f"--type {printable(args.type)}: an adapter is F32, F16, BF16 or Q8_0")
    output = args.output or Path(f"{name}-{kind}.gguf")
    threads = args.threads or available_cores()
    report = convert_adapter(adapter, base, output, tensor_type(kind), force=args.force, threads=threads)
    if args.json:
        print(json.dumps({"path": str(report.path), "matrices": report.n_matrices, "bytes": report.n_bytes}))
    elif not args.quiet:
        print(f"an adapter of {report.n_matrices} matrices, {human_bytes(report.n_bytes)}")
        print(printable(report.path, 4096))
    return 0


def _complete_type(prefix: str, **_: object) -> dict[str, str]:
    from convert.file_types import FILE_TYPES

    return {
        kind.name: f"{kind.bits_per_weight:.2f} bits per weight"
        for kind in FILE_TYPES.values()
        if not kind.needs_matrix and kind.name.startswith(prefix.upper())
    }


def _library_place(name: str, kind: FileType) -> Path:
    from models.library import destination, models_folder

    models_folder().mkdir(parents=True, exist_ok=True)
    return destination(name, kind.name)


def _print_types() -> None:
    from convert.file_types import FILE_TYPES

    print("type        bits per weight (of Llama 3 8B)")
    for kind in FILE_TYPES.values():
        if not kind.needs_matrix:
            print(f"{kind.name:<11} {kind.bits_per_weight:5.2f}")
    refused = ", ".join(kind.name for kind in FILE_TYPES.values() if kind.needs_matrix)
    print(f"Refused where the model needs an importance matrix for them: {refused}.")


def _print_plan(plan: FilePlan, *, as_json: bool) -> None:
    tensors: list[dict[str, Any]] = [
        {"name": t.plan.name, "shape": list(t.plan.shape[::-1]), "type": t.kind.name, "bytes": t.nbytes}
        for t in plan.tensors
    ]
    if as_json:
        print(json.dumps({**_facts(plan), "tensors": tensors}))
    else:
        for tensor in tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            print(f"{tensor['name']:<32} {shape:>16}  {tensor['type']:<8} {tensor['bytes']:>14,}")
        print(_summary(plan))


def _print_report(report: ConversionReport, *, as_json: bool, quiet: bool) -> None:
    for warning in () if quiet else report.warnings:
        print(f"note: {printable(warning, 1000)}", file=sys.stderr)
    if as_json:
        facts = {"path": str(report.path), "seconds": round(report.seconds, 3), "checked": report.checked}
        facts |= {"parts": len(report.paths)}
        print(json.dumps({**facts, **_facts(report.plan), "warnings": report.warnings}))
    elif not quiet:
        for total in report.plan.totals:
            print(f"  {total.kind:<8} {total.n_tensors:>5} tensors {human_bytes(total.n_bytes):>10}")
        parts = f" in {len(report.paths)} parts" if len(report.paths) > 1 else ""
        print(f"{_summary(report.plan)}{parts}, {report.seconds:.1f} s")
        print(printable(report.path, 4096))


def _facts(plan: FilePlan) -> dict[str, object]:
    return {
        "file_type": plan.file_type.name,
        "bytes": plan.n_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "types": {total.kind: {"tensors": total.n_tensors, "bytes": total.n_bytes} for total in plan.totals},
    }


def _summary(plan: FilePlan) -> str:
    weights = human_count(plan.n_weights)
    return (
        f"{plan.file_type.name}: {weights} weights, {human_bytes(plan.n_bytes)}, {plan.bits_per_weight:.2f} bits each"
    )
