"""The reference page of all configuration keys, generated from their declarations.

``python -m ep_moe.config_reference > docs/configuration.md``
"""

from __future__ import annotations

from collections.abc import Iterator

from ep_moe.config import Config
from ep_moe.config_fields import describe_type, format_value, walk

_INTRODUCTION = """\
# Configuration

Everything is set in one YAML file; `configs/` holds commented examples. Any key can be overridden on the command
line of `examples/train_moe.py` with `--set key.path=value`. Keys that are left out have the defaults below. A key
that does not exist, a wrong type, a value out of bounds or keys that contradict each other end the program with one
line that names the key, the value, what is allowed and, for a misspelt key, the nearest real one.

`model`, `moe` and `phases` describe the layer (`EPMoELayer` reads nothing else); `training` and `data` belong to
the example.
"""


def reference_page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_INTRODUCTION, *_tables()]) + "\n"


def _tables() -> Iterator[str]:
    section = None
    for path, value, kind, field in walk(Config()):
        parent, _, name = path.rpartition(".")
        if parent != section:
            yield from (f"\n## {parent}\n", "| key | values | default | meaning |", "|---|---|---|---|")
            section = parent
        bounds = [
            f"{sign} {field.metadata[bound]}"
            for bound, sign in (("low", ">="), ("high", "<="))
            if field.metadata[bound] is not None
        ]
        values = ", ".join([describe_type(kind).removeprefix("one of "), *bounds])
        yield f"| `{name}` | {values} | `{format_value(value)}` | {field.metadata['doc']} |"


if __name__ == "__main__":
    print(reference_page(), end="")
