"""Read one YAML file safely, remembering on which line every key and entry stands.

Refused with one clear line each: a path that is no readable file, another encoding than UTF-8, a
second document, tags (``!!python/...``), keys given twice, nesting or aliases that blow up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from repro.errors import BadInput, Fault, near_matches

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 30

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlFile:
    """The data of a file and the line of each of its parts.

    Attributes:
        path: Path as given by the user.
        data: Plain dicts, lists and scalars.
        lines: Location (keys and indices from the top) -> line, counted from 1.
    """

    path: str
    data: Any
    lines: Mapping[Location, int] = field(repr=False)

    def where(self, location: Sequence[str | int]) -> str:
        """Return ``<file>:<line>`` of a location, or of its nearest enclosing part."""
        place = tuple(location)
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"


class _Loader(yaml.SafeLoader):
    """Safe loader without dates, and with 1e-3 as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load(path: str | Path) -> YamlFile:
    """Read a YAML file.

    Raises:
        BadInput: If the file cannot be read or breaks one of the rules above; names file:line.
    """
    shown = str(path)
    text = _read(shown)
    _check_tokens(shown, text)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Location, int] = {}
            if node is not None:
                _walk(shown, node, (), lines, [0])
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax_error(shown, error) from None
    except BadInput:
        raise
    except (ValueError, OverflowError) as error:  # an impossible number, such as 0x or 1__e
        raise BadInput(Fault(shown, "every value", "valid YAML", str(error))) from None
    return YamlFile(shown, data, lines)


def _read(shown: str) -> str:
    path = Path(shown)
    if path.is_dir():
        raise BadInput(Fault(shown, "the path", "a file", "a folder"))
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        got = error.strerror or str(error)
        raise BadInput(Fault(shown, "the path", "a readable file", got)) from None
    if len(raw) > MAX_BYTES:
        raise BadInput(Fault(shown, "the file", f"at most {MAX_BYTES} bytes", "more"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        got = f"byte 0x{raw[error.start]:02x}"
        raise BadInput(Fault(f"{shown}:{line}", "the file", "UTF-8 text", got)) from None


def _check_tokens(shown: str, text: str) -> None:
    """Refuse tags, a second document and deep nesting before anything recursive runs."""
    depth = documents = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            where = f"{shown}:{token.start_mark.line + 1}"
            if isinstance(token, yaml.TagToken):
                tag = "".join(part or "" for part in token.value)
                raise BadInput(Fault(where, "a value", "plain YAML without tags", f"tag {tag}"))
            if isinstance(token, yaml.DocumentStartToken):
                documents += 1
                if documents > 1 or token.start_mark.index and _has_content(text, token):
                    raise BadInput(Fault(where, "the file", "one document", "a second one"))
            if isinstance(token, _OPENING):
                depth += 1
                if depth > MAX_DEPTH:
                    rule = f"nested at most {MAX_DEPTH} deep"
                    raise BadInput(Fault(where, "a value", rule, "more"))
            elif isinstance(token, _CLOSING):
                depth -= 1
    except yaml.YAMLError as error:
        raise _syntax_error(shown, error) from None


_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def _has_content(text: str, token: yaml.Token) -> bool:
    """Tell whether anything but comments and blank lines stands before a document marker."""
    before = text[: token.start_mark.index].splitlines()
    return any(line.strip() and not line.lstrip().startswith(("#", "%")) for line in before)


def _walk(
    shown: str, node: yaml.Node, place: Location, lines: dict[Location, int], count: list[int]
) -> None:
    """Note the line of every part; aliases are followed, so their expansion is counted."""
    count[0] += 1
    where = f"{shown}:{node.start_mark.line + 1}"
    if count[0] > MAX_NODES:
        rule = f"at most {MAX_NODES} values with all aliases expanded"
        raise BadInput(Fault(where, "the file", rule, "more"))
    if len(place) > MAX_DEPTH:
        raise BadInput(Fault(where, "a value", f"nested at most {MAX_DEPTH} deep", "more"))
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(shown, item, (*place, index), lines, count)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise BadInput(Fault(f"{shown}:{line}", "a key", "a plain word", "a collection"))
            if key.value in seen:
                got = f"{key.value} (first on line {seen[key.value]})"
                raise BadInput(Fault(f"{shown}:{line}", "every key", "given once", got))
            seen[key.value] = line
            lines[(*place, key.value)] = line
            _walk(shown, value, (*place, key.value), lines, count)


def _syntax_error(shown: str, error: yaml.YAMLError) -> BadInput:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{shown}:{mark.line + 1}" if mark else shown
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return BadInput(Fault(where, "the file", "valid YAML", f"a syntax error ({problem})"))


def validation_faults(
    file: YamlFile,
    errors: Iterable[Mapping[str, Any]],
    *,
    at: Location = (),
    known: Mapping[str, Iterable[str]] | None = None,
) -> list[Fault]:
    """Turn the errors of a pydantic ``ValidationError`` into faults with file:line.

    Args:
        file: The file that was validated.
        errors: ``ValidationError.errors()``.
        at: Location of the validated part inside the file.
        known: Dotted location of a mapping ("" for the top) -> its known keys, for near matches.
    """
    from repro.schema import rule_of  # pydantic, which only a driver needs

    faults = []
    for error in errors:
        # pydantic adds names of union members and "[key]" marks, which are no places of the file.
        place = at
        for part in error["loc"]:
            if (*place, part) in file.lines:
                place = (*place, part)
        missing = error["type"] == "missing"
        path = dotted((*place, error["loc"][-1]) if missing else place) or "the file"
        remedy = ""
        if error["type"] == "extra_forbidden" and known is not None:
            names = known.get(dotted(place[:-1]), ())
            remedy = near_matches(str(place[-1]), names) if names else ""
        got = "nothing" if missing else error.get("input")
        faults.append(Fault(file.where(place), path, rule_of(error), got, remedy))
    return faults


def dotted(location: Sequence[str | int]) -> str:
    """Return ``profiles.embedded.methods[1].threshold`` for a location."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
