"""Mutations of inputs in the places where decoders break.

Half of the mutated inputs are still well-formed: JSON that parses, or a state with the right
checksum. They reach the code behind the first check. The caller's random numbers decide every
mutation, so the same seed gives the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

LONGEST_BYTES = 1 << 20

PARENT_MAX_BYTES = 1 << 16
"""Largest input to mutate; mutating larger ones would take longer than decoding them."""

_NESTED = 20_000


class Text(str):
    """Raw text for a JSON value, which may be invalid JSON."""


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.1, -0.0, 1e308, 5e-324, "", "a", "0", "fraud", "EUR"),
    *(2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30),
    *(253_402_300_799_999, 253_402_300_800_000, 1_534_327_200_000),
    *(
        "2018-08-15T10:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59.999999-23:59",
        "2018-08-15T24:00:00Z",
        "2016-12-31T23:59:60Z",
        "2018-08-15",
        "2018-08-15T10:00:00",
        "2018-02-30T10:00:00Z",
        "\x00",
        "\u2028",
        "\ud7ff\ue000\uffff",
        "\U0010ffff",
        "%s%n{}",
        "../../etc/passwd",
        "\u202e\u0000\u0007",
        "e\u0301" * 64,
    ),
    *(
        Text(t)
        for t in (
            *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E+400", "1e-999", "0.0e-0"),
            *("00", "-", "+1", "1.", ".5", "0x10", "1_000", "9" * 400, "9" * 5000),
            *("0." + "0" * 400 + "1", "1" + "0" * 400 + "e-400"),
            *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x41"', '"\\"'),
            *("'a'", "nul", "tru", "undefined", "/**/", "", ",", "\ufeff1", "[", "{", "]", "}"),
            "[" * _NESTED,
            '{"a":' * _NESTED,
            "[" * 900 + "]" * 900,
            "[" * _NESTED + "]" * _NESTED,
            '{"a":' * _NESTED + "1" + "}" * _NESTED,
        )
    ),
)

NAMES = ("transaction_id", "account_id", "amount", "timestamp", "", "__proto__", "\x00", "a" * 300)

INTEGERS = (
    *(0, 1, 2, 8, 127, 128, 255, 256, 32_767, 32_768, 65_535, 1 << 20, (1 << 20) + 1, 1 << 31),
    *((1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, overwrite, delete, repeat or insert a few bytes."""
    changed = bytearray(data)
    for _ in range(1 << random.randrange(4)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << random.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = random.randrange(256)
            case 2:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(INTEGERS) % (1 << 8 * size)
                order: Any = random.choice(("little", "big"))
                changed[at : at + size] = number.to_bytes(size, order)
            case 3:
                del changed[at : at + 1 + random.randrange(16)]
            case 4:
                del changed[at:]
            case 5:
                piece = changed[at : at + 1 + random.randrange(64)]
                changed[at:at] = piece * (1 + random.randrange(4))
            case _:
                changed[at:at] = random.randbytes(1 + random.randrange(16))
    return bytes(changed)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Change a value, name, length or depth of a JSON text, or repeat a name."""
    try:
        tree = json.loads(data)
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            tree = mutate_tree(tree, random)
        return written(tree, random).encode(errors="surrogatepass")
    except (ValueError, RecursionError):  # no JSON, or nested too deep
        return mutate_bytes(data, random)


def mutate_tree(tree: Any, random: Random) -> Any:
    """Return the tree with one changed place."""
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        return _mutate_object(dict(tree), random)
    if isinstance(tree, list) and tree and random.random() < 0.8:
        changed = list(tree)
        at = random.randrange(len(changed))
        match random.randrange(5):
            case 0:
                del changed[at]
            case 1:
                many = random.choice((1, 2, 100)) if len(changed) < 100 else 1
                changed[at:at] = changed[at : at + 1] * many
            case _:
                changed[at] = mutate_tree(changed[at], random)
        return changed
    if isinstance(tree, str) and not isinstance(tree, Text) and random.random() < 0.5:
        return _mutate_text(tree, random)
    if isinstance(tree, int | float) and abs(tree) < 1e30 and random.random() < 0.5:
        return random.choice(
            (tree + 1, tree - 1, -tree, tree * 2, tree * 1e6, float(tree), str(tree))
        )
    return random.choice(SCALARS)


def _mutate_object(tree: dict[str, Any], random: Random) -> dict[str, Any]:
    name = random.choice(list(tree))
    match random.randrange(8):
        case 0:
            del tree[name]
        case 1:
            tree[random.choice(NAMES)] = tree[name]
        case 2:
            tree[name] = [tree[name]] if random.random() < 0.5 else {name: tree[name]}
        case 3:
            tree[name] = tree[random.choice(list(tree))]
        case _:
            tree[name] = mutate_tree(tree[name], random)
    return tree


def _mutate_text(text: str, random: Random) -> Any:
    at = random.randrange(len(text) + 1)
    match random.randrange(5):
        case 0:
            return text[:at]
        case 1:
            return text * (random.choice((2, 10, 300)) if len(text) < 1000 else 1)
        case 2:
            return Text(json.dumps(text[:at] + "\ud800" + text[at:]))
        case 3:
            return text[:at] + chr(random.randrange(0x10000)) + text[at:]
        case _:
            return text[:at] + text[at + 1 :]


def written(tree: Any, random: Random) -> str:
    """Encode the tree as JSON; some objects repeat a name, and some texts have escapes."""
    if isinstance(tree, Text):
        return str(tree)
    if isinstance(tree, dict):
        members = [f"{_name(name, random)}:{written(tree[name], random)}" for name in tree]
        if members and random.random() < 0.1:
            name = random.choice(list(tree))
            double = f"{json.dumps(name)}:{written(random.choice(SCALARS), random)}"
            members.insert(random.randrange(len(members) + 1), double)
        return "{" + ",".join(members) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(written(item, random) for item in tree) + "]"
    try:
        return json.dumps(tree, ensure_ascii=random.random() < 0.5)
    except ValueError:  # a number has more digits than Python writes
        return "1e999"


def _name(name: str, random: Random) -> str:
    if name and random.random() < 0.02:
        return '"' + "".join(f"\\u{ord(c) & 0xFFFF:04x}" for c in name) + '"'
    return json.dumps(name)


def mutate_record(data: bytes, random: Random) -> bytes:
    """Mutate a record's JSON value, or its bytes."""
    return (mutate_bytes if random.random() < 0.25 else mutate_json)(data, random)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Mutate a safetensors file: its length field, header, our header in it, or tensors."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = random.random()
    if kind < 0.1 or length > len(data):
        return mutate_bytes(data, random)
    if kind < 0.15:
        return mutate_bytes(data[:8], random) + data[8:]
    if kind < 0.25:
        tensors = mutate_bytes(tensors, random)
    elif kind < 0.55:
        header = mutate_record(header, random)
    else:
        header = _mutate_own_header(header, random)
    if random.random() < 0.1:
        header += b" " * random.randrange(9)
    return (len(header) % (1 << 64)).to_bytes(8, "little") + header + tensors


def _mutate_own_header(header: bytes, random: Random) -> bytes:
    try:
        outer = json.loads(header)
        own = outer["__metadata__"]["recur"].encode(errors="surrogatepass")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return mutate_record(header, random)
    outer["__metadata__"]["recur"] = mutate_record(own, random).decode(errors="replace")
    return json.dumps(outer).encode()
