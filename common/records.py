"""The one reader of JSON: bytes become a dataclass, or another annotated type, with types and ranges checked.

    @dataclasses.dataclass
    class Shard:
        file: FileName
        count: Count

    shard = read_record(Shard, "shard.json", remedy="pack the set again")

Keys that the type does not have are ignored. pydantic checks.
"""

import contextlib
import functools
import json
import reprlib
from typing import Annotated

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from common.errors import InputError
from common.files import read_bytes, read_lines

Whole = Annotated[int, Field(ge=0, lt=1 << 63)]
Count = Annotated[int, Field(ge=1, lt=1 << 63)]
Finite = FiniteFloat
Positive = Annotated[FiniteFloat, Field(gt=0)]
FileName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # in the same folder

_adapter = functools.cache(TypeAdapter)  # building one takes longer than reading a line of a log


def read_record(kind, path, remedy):
    """Content of the JSON file `path` as `kind`. Raises InputError naming file, key and remedy."""
    return parse_record(kind, read_bytes(path, remedy), path, remedy)


def read_record_lines(kind, path, where=None):
    """[(number, record)] of a file of JSON lines; `where` as in read_lines. Raises InputError naming line and key."""
    lines, where = read_lines(path, where), where or path
    return [(number, parse_record(kind, line, f"{where}, line {number}", "restore it")) for number, line in lines]


def parse_record(kind, data, where, remedy):
    """The JSON text `data` as `kind`; `where` names it in messages. Raises InputError."""
    with _named_fault(where, remedy):
        try:
            return _adapter(kind).validate_json(data, strict=True)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
        # json reads what pydantic does not: a byte order mark, and lone surrogates, of file names that are not UTF-8
        return _adapter(kind).validate_python(json.loads(data))


def check_record(kind, value, where, remedy):
    """A Python value (of a checkpoint, say) as `kind`. Raises InputError naming key and remedy."""
    with _named_fault(where, remedy):
        return _adapter(kind).validate_python(value)


@contextlib.contextmanager
def _named_fault(where, remedy):
    try:
        yield
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"])).replace(".constrained-float", "")  # shards.0.count; one of two types
        found = "" if fault["type"] == "missing" else f" is {' '.join(reprlib.repr(fault['input']).split())}:"
        raise InputError(f"{where}{f': {key!r:.100}' if key else ''}{found} {fault['msg']}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); {remedy}") from None
