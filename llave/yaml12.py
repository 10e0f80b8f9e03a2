"""Read and write YAML 1.2, for recipes. ``2e-5`` is a number. ``no``, ``on``, ``1:30`` are text."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError


class _Loader(yaml.SafeLoader):
    """A loader that refuses a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for (key, _), text in zip(node.value, keys, strict=True):
            if keys.count(text) > 1 and isinstance(text, str):
                raise ConstructorError(None, None, f"{text} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A dumper that writes lists in flow style, ``[a, b]``."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
for _tag, _pattern, _first in (
    ("bool", "(?i:true|false)", "tTfF"),
    ("int", "[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)
# The dumper quotes text that the loader would read as another type.
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=True
    ),
)


def load(text: str, where: str) -> Any:
    """Parse YAML.

    Args:
        text: the YAML text.
        where: where it is from, for the error.

    Raises:
        ValueError: it is no YAML, nested too deep, or repeats a key.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def dump(value: Any) -> str:
    """Return YAML for a value of dicts, lists, text, numbers, booleans and None."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
