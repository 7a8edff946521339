"""The README's table of families, out of the families themselves: `python -m scripts.families_table`.

It rewrites README.md between two marks; a test holds it true.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import models.families
from models.families import ModelFamily
from scripts.environment import ROOT

BEGIN, END = "<!-- families: made by python -m scripts.families_table -->", "<!-- end of families -->"
README = ROOT / "README.md"


def table() -> str:
    """A row for each module of kin: what it is for, its architectures, and llama.cpp's."""
    head = ["| models | `architectures` in config.json | in llama.cpp |", "| --- | --- | --- |"]
    return "\n".join([*head, *sorted(_rows(), key=str.lower)])


def _rows() -> Iterator[str]:
    for info in pkgutil.iter_modules(models.families.__path__):
        module = importlib.import_module(f"models.families.{info.name}")
        source = inspect.getsource(module)  # a module may import families of another
        families = [
            value
            for name, value in vars(module).items()
            if isinstance(value, ModelFamily) and value.architectures and f"\n{name} = " in source
        ]
        if families:
            about = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
            architectures = ", ".join(f"`{name}`" for family in families for name in family.architectures)
            ggufs = ", ".join(f"`{name}`" for name in dict.fromkeys(family.gguf_arch for family in families))
            yield f"| {about} | {architectures} | {ggufs} |"


def main() -> None:
    """Write the table into README.md."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
