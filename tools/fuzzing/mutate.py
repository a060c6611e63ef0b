"""Ways to break the files of a model. All chance comes from the generator that is handed in: the same one breaks them alike.

Each kind of file is broken where it has structure (a field of JSON, the length of a GGUF text), sometimes byte by byte, and a
packed model is sealed again afterwards, so that it is not its checksum that refuses it. Knows nothing of what readers make of
them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from fuzzing.gguf_bytes import joined, split

Files = Mapping[str, bytes]
"""Name in a folder -> content."""

NUMBERS = (
    *(-1, 0, 1, 2, 3, 4, 7, 8, 31, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), 10**400),
)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-300, 1e30, 1e300, -1.5, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *(
        "",
        "x",
        "\0",
        "a\nb",
        "\x1b[31mred\x1b[0m",
        "../other",
        "/etc/passwd",
        "model.safetensors",
        "a" * 3000,
        "\ud800",
        "{{",
        "default",
    ),
    *(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gptq",
        "awq",
        "yarn",
        "llama3",
        "linear",
        "dynamic",
        "F32",
        "BF16",
        "I32",
        "F8_E4M3",
    ),
    *("none", "int8", "int4", "float32", "bfloat16", "group", "channel", "block", "tensor", "pack-quantized", "silu", "gelu"),
)
SCALARS: tuple[Any, ...] = (None, True, False, *NUMBERS, *FLOATS, *TEXTS)
DEPTH = 100_000
"""Brackets within brackets, more than any parser's stack takes."""

TEMPLATES = (
    *("{{ messages }}", "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ bos_token }}"),
    *(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
    ),
    *("{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ (messages|attr('__class__')) }}", "{{ namespace.__init__ }}"),
    *(
        "{{ '%s'.__mod__.__self__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ messages.append(1) }}",
    ),
    *(
        "{% set x = namespace(a='a') %}{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}",
        "{{ 'a' * 10**10 }}",
    ),
    *("{{ 'a'|center(10**10) }}", "{{ [0]|tojson(indent=10**9) }}", "{{ range(10**9) }}", "{{ 'ab'.replace('', 'a' * 10**6) }}"),
    *("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as y %}"),
    *(
        "{{ raise_exception('no') }}",
        "{{ raise_exception(messages) }}",
        "{{ strftime_now('%Y') }}",
        "{{ strftime_now('\ud800') }}",
    ),
    *(
        "{% generation %}x{% endgeneration %}",
        "{% generation %}",
        "{% if %}",
        "{% for %}",
        "{{ '%n' % 1 }}",
        "{{ 1/0 }}",
        "{{ 2.0 ** 5000 }}",
    ),
    *(
        "{% set x = x %}",
        "{{ messages|map(attribute='role')|join }}",
        "{% break %}",
        "{{ dict(a=1)|tojson }}",
        "{{ joiner() }}",
        "{{ debug() }}",
    ),
    *(
        "{{ namespace(**messages[0]) }}",
        "{% filter upper %}x{% endfilter %}",
        "{% call f() %}{% endcall %}",
        "{{ x is divisibleby 0 }}",
    ),
)


def mutated(files: Files, random: Random) -> dict[str, bytes]:
    """A folder with one or some things broken."""
    broken = dict(files)
    names = [name for name in broken if name.rpartition(".")[2] in _WAYS]
    while True:
        name = random.choice(names)
        broken[name] = mutated_file(name, broken[name], random)
        if random.random() < 0.6:
            break
    if random.random() < 0.03:
        del broken[random.choice(list(broken))]
    if "pack.json" in broken and random.random() < 0.1:
        broken = resized(broken, random)
    if "pack.json" in broken and random.random() < 0.85:
        broken = sealed(broken)
    return broken


def mutated_file(name: str, content: bytes, random: Random) -> bytes:
    """One file, broken as its kind is; sometimes byte by byte."""
    if random.random() < 0.12:
        return mutated_bytes(content, random)
    try:
        return _WAYS[name.rpartition(".")[2]](content, random)
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        RecursionError,
        struct.error,
    ):  # broken so much before that it has no structure left
        return mutated_bytes(content, random)


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """Bits, bytes and stretches changed, taken out, put in; a file cut off or grown."""
    data = bytearray(content)
    for _ in range(1 << random.randrange(4)):
        # Most of what can be wrong is at the start.
        at = random.randrange(min(len(data), 512) if random.random() < 0.5 else len(data)) if data else 0
        match random.randrange(8):
            case 0 if data:
                data[at] ^= 1 << random.randrange(8)
            case 1 if data:
                data[at] = random.randrange(256)
            case 2:
                del data[at : at + random.randrange(1, 64)]
            case 3:
                data[at:at] = random.randbytes(random.randrange(1, 16))
            case 4:
                data[at:at] = data[at : at + random.randrange(1, 256)]
            case 5:
                del data[at:]
            case 6:
                data += bytes(random.randrange(1, 4096))
            case _:
                width = random.choice((1, 2, 4, 8))
                data[at : at + width] = (random.choice(NUMBERS) % (1 << (8 * width))).to_bytes(width, "little")
    return bytes(data)


def mutated_json(content: bytes, random: Random) -> bytes:
    """A value replaced, taken out, doubled or moved; a key renamed or written twice; the text nested or cut."""
    value = json.loads(content)
    for _ in range(1 << random.randrange(3)):
        value = _mutated_value(value, random)
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    match random.randrange(60):
        case 0:
            return text.replace(b",", b", " + text[1:-1][: text.find(b",") + 1], 1)  # the first key a second time
        case 1:
            return b"[" * DEPTH + text
        case 2:
            return text[: random.randrange(len(text) + 1)]
        case 3:
            return b"\xef\xbb\xbf" + text
        case 4:
            return text.replace(b": 1", b": " + b"9" * 5000, 1)
        case _:
            return text


def mutated_safetensors(content: bytes, random: Random) -> bytes:
    """The header as JSON, its length, or the size of what follows."""
    end = 8 + int.from_bytes(content[:8], "little")
    header, data = content[8:end], content[end:]
    if random.random() < 0.85:
        header = mutated_json(header, random)
    if random.random() < 0.1:
        data = mutated_bytes(data, random)
    length = len(header)
    if random.random() < 0.1:
        length = random.choice((*NUMBERS, length - 1, length + 1, len(content))) % 2**64
    return length.to_bytes(8, "little") + header + data


def mutated_gguf(content: bytes, random: Random) -> bytes:
    """Fields of the header: numbers, texts with or without their length; fields taken out, doubled, swapped."""
    pieces, rest = split(content)
    for _ in range(1 << random.randrange(3)):
        at = random.randrange(len(pieces))
        piece = pieces[at]
        match random.randrange(10):
            case 0:
                del pieces[at : at + random.randrange(1, 4)]
            case 1:
                pieces[at:at] = pieces[at : at + random.randrange(1, 8)]
            case 2:
                other = random.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case _ if piece.kind == "text":
                piece.content = (
                    random.choice(TEXTS).encode(errors="surrogatepass")
                    if random.random() < 0.6
                    else random.choice(pieces).content
                )
                if random.random() < 0.9:
                    pieces[at - 1].content = len(piece.content).to_bytes(8, "little")
            case _ if piece.kind == "type":
                piece.content = random.randrange(45).to_bytes(4, "little")
            case _:
                width = len(piece.content)
                old = int.from_bytes(piece.content, "little")
                number = random.choice((*NUMBERS, old - 1, old + 1, old * 2, old // 2, old + 32))
                piece.content = (number % (1 << (8 * width))).to_bytes(width, "little")
    if random.random() < 0.05:
        rest = mutated_bytes(rest, random)
    return joined(pieces, rest)


def mutated_template(content: bytes, random: Random) -> bytes:
    """Pieces of templates put in, taken out, put together."""
    text = content.decode(errors="surrogatepass")
    at = random.randrange(len(text) + 1)
    match random.randrange(5):
        case 0:
            text = "".join(random.choices(TEMPLATES, k=random.randrange(1, 4)))
        case 1:
            text = text[:at] + random.choice(TEMPLATES) + text[at:]
        case 2:
            text = text[:at] + text[at + random.randrange(1, 40) :]
        case 3:
            text = text[:at] + random.choice(("{{", "}}", "{%", "%}", "{#", "'", "(", "[", "|", ".", "-")) + text[at:]
        case _:
            text = text.replace(
                random.choice(("messages", "content", "role", "for", "if")), random.choice(("x", "0", "range(9)", "")), 1
            )
    return text.encode(errors="surrogatepass")


def resized(files: Files, random: Random) -> dict[str, bytes]:
    """A packed model whose layers have more or fewer bytes than they should, in index and files alike."""
    try:
        part, change = random.choice(("attention", "records")), 64 * random.choice((-8, -1, 1, 64))
        index = json.loads(files["pack.json"])
        index[f"{part}_nbytes"] += change
        resized = {**files, "pack.json": json.dumps(index).encode()}
        for name in [name for name in files if name.startswith("layer-")]:
            end = 8 + int.from_bytes(files[name][:8], "little")
            header, data = json.loads(files[name][8:end]), bytearray(files[name][end:])
            at = header[part]["data_offsets"][1]
            data[at:at] = bytes(max(change, 0))
            del data[at + min(change, 0) : at]
            header[part]["shape"][0] += change // 64
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    first, last = entry["data_offsets"]
                    entry["data_offsets"] = [first + change * (first >= at), last + change * (last >= at)]
            text = json.dumps(header).encode()
            resized[name] = len(text).to_bytes(8, "little") + text + data
        return resized
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return dict(files)


def sealed(files: Files) -> dict[str, bytes]:
    """A packed model whose seals and checksum are right, whatever its files have become. As it is where its index is no index."""
    try:
        index = json.loads(files["pack.json"])
        seals = {name: seal for name, seal in index["files"].items() if name in files}
        for name, seal in seals.items():
            head_nbytes = len(files[name]) if not name.endswith(".safetensors") else 8 + int.from_bytes(files[name][:8], "little")
            head = files[name][:head_nbytes]
            seal.update(nbytes=len(files[name]), head_nbytes=len(head), crc32=zlib.crc32(head))
        index["files"] = {**index["files"], **seals}
        index.pop("crc32", None)
        index["crc32"] = zlib.crc32(json.dumps(index, sort_keys=True, separators=(",", ":")).encode())
        return {**files, "pack.json": json.dumps(index).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError):
        return dict(files)


def _mutated_value(root: Any, random: Random) -> Any:
    places = _places(root)
    holder, key = random.choice(places)
    if holder is None:
        return random.choice((root, root, root, [], [root], {}, *SCALARS)) if random.random() < 0.1 else root
    old = holder[key]
    match random.randrange(9):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(TEXTS) if random.random() < 0.5 else _near(key, random)] = holder.pop(key)
        case 2:
            other, other_key = random.choice(places)
            if other is not None and (other_key in other if isinstance(other, dict) else other_key < len(other)):
                holder[key] = json.loads(json.dumps(other[other_key]))
        case 3 if isinstance(holder, list):
            holder.insert(key, old)
        case 4:
            holder[key] = random.choice(([old], {"a": old}, [], {}, [old] * 300))
        case 5 | 6 if isinstance(old, int) and not isinstance(old, bool):
            holder[key] = random.choice(
                (old - 1, old + 1, old * 2, old // 2, -old, old + 64, old * 64, str(old), float(old % 2**60))
            )
        case 5 | 6 if isinstance(old, str):
            holder[key] = _near(old, random)
        case _:
            holder[key] = random.choice(SCALARS)
    return root


def _near(text: str, random: Random) -> str:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(("", "x", "0", "\0", "/", ".", " ", "é")) + text[at + random.randrange(2) :]


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Every place of a value: what holds it, and under which key. The root is held by nothing."""
    places: list[tuple[Any, Any]] = [(None, None)]
    left = [root]
    while left:
        holder = left.pop()
        if isinstance(holder, dict):
            items: Any = list(holder.items())
        elif isinstance(holder, list):
            items = list(enumerate(holder))
        else:
            continue
        places += [(holder, key) for key, _ in items]
        left += [value for _, value in items]
    return places


_WAYS: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": mutated_json,
    "safetensors": mutated_safetensors,
    "gguf": mutated_gguf,
    "jinja": mutated_template,
}
"""Ending of a name -> how such a file is broken."""
