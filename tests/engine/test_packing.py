"""Packed copies: the bits of quantising at load, from memory and from disk; what they decide, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import Engine, NoProgress, open_model, packing
from offload_sirius.engine.packing import pack, report_of, source_fingerprint, verify_copy
from offload_sirius.engine.placement import DTYPES, place
from offload_sirius.engine.planning import ELEMENT_NBYTES, as_packed, dtype_of
from offload_sirius.errors import BudgetError, CheckpointError, ConfigError
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.machine import physical_cores
from offload_sirius.quantization import WeightFormat
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.layout import LayerLayout, layer_layout
from offload_sirius.weights.load import Loader
from offload_sirius.weights.pieces import PIECE_NBYTES, reading_cost
from offload_sirius.weights.quant import quantise_rows, quantization_error
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import PACKED_ROW_NBYTES
from offload_sirius_loaders.pack_index import INDEX_NAME, MARKER_NAME, layer_file_name
from offload_sirius_loaders.packed import ERRORS_NOTE, open_packed

from ..loaders.packs import JOB, write_pack
from ..weights.simulated import SimulatedUplink
from .conftest import CONTEXT, TINY, Load, hot_budgets

ASKED: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
SAMPLED = {"temperature": 1.1, "top_p": 0.95, "seed": 5}
KINDS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16"},
    {"quantize": "int8"},
    {"quantize": "int4"},
    {"quantize": "int4", "quantize_group": 32},
    {"quantize": "int4", "dtype": "bfloat16", "quantize_head": "int8"},
]
TIED = "synthetic:llama-3.2-1b?layers=2&width=64&heads=4&kv_heads=2&ffn=128&vocab=384&positions=256&dtype=F32"
SHORT = "synthetic:tiny?layers=4&width=64&heads=4&kv_heads=2&ffn=192&dtype=F32"
PLACES = ["resident", "host", "host and disk", "disk"]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def packed(kind: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of that kind."""
    return packed_as(kind, tmp_path_factory.mktemp("packs") / "m")


@pytest.fixture(scope="module")
def at_load(kind: dict[str, Any]) -> Iterator[Engine]:
    """The model itself, quantised while it is loaded, resident."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT, **kind) as engine:
        yield engine


def packed_as(kind: dict[str, Any], directory: Path, model: str = TINY) -> str:
    pack(EngineConfig(model=model, **kind), directory, NoProgress())
    return str(directory)


@pytest.mark.parametrize("model", [TINY, TIED])
def test_a_head_that_is_packed_in_8_bits_is_read_as_it_is_and_gives_the_same_bits(model: str, load: Load, tmp_path: Path) -> None:
    kind = {"quantize": "int8", "quantize_head": "int8"}
    copy = open_checkpoint(packed_as(kind, tmp_path / "m", model))
    spec = copy.spec
    assert copy.tensors[None, "head"].element == "U8"
    assert copy.tensors[None, "head"].shape == (spec.vocab_size, WeightFormat(kind="int8", group=64).row_nbytes(spec.width))
    packed, at_load = load(str(tmp_path / "m")), load(model, **kind)
    heads = [engine._streamer.head for engine in (packed, at_load)]
    assert all(isinstance(head, QuantizedRows) for head in heads)
    assert torch.equal(heads[0].rows, heads[1].rows)  # type: ignore[union-attr]
    assert packed.generate("hello", **ASKED).token_ids == at_load.generate("hello", **ASKED).token_ids
    verify_copy(str(tmp_path / "m"), NoProgress())


def test_a_plain_head_of_a_packed_model_is_quantised_while_loading_where_that_is_asked_for(load: Load, tmp_path: Path) -> None:
    copy = packed_as({"quantize": "int4"}, tmp_path / "m")
    packed, at_load = load(copy, quantize_head="int8"), load(quantize="int4", quantize_head="int8")
    assert packed.generate("hello", **ASKED).token_ids == at_load.generate("hello", **ASKED).token_ids
    assert packed.plan.device_bill["head"] == at_load.plan.device_bill["head"] < load(copy).plan.device_bill["head"]


def layers_of(model: str, kind: dict[str, Any]) -> list[bytes]:
    """The bytes of each layer as it is loaded."""
    checkpoint = open_checkpoint(model)
    config = as_packed(EngineConfig(model=model, **kind), checkpoint)
    dtype = dtype_of(config, checkpoint.spec)
    layout = layer_layout(checkpoint.spec, ELEMENT_NBYTES[dtype], 0, config.weight_format)
    quantises = config.weight_format is not None and checkpoint.packed is None
    readers = ReaderPool(checkpoint, 2)
    loader = Loader(checkpoint, readers, lambda nbytes: None, DTYPES[dtype] if quantises else None)
    found = []
    for layer in range(checkpoint.spec.num_layers):
        storage = torch.zeros(layout.nbytes, dtype=torch.uint8)
        loader.load_layer(layer, LayerBuffer(storage, checkpoint.spec, layout, DTYPES[dtype]))
        found.append(storage.numpy().tobytes())
    readers.close()
    return found


def budgets(where: str, model: str, **decoding: Any) -> dict[str, str]:
    """Budgets, to the byte, that put the layers of a packed model there; two have room on the device unless all are resident."""
    config = EngineConfig(model=model, device="cpu", max_context=CONTEXT, decoding=DecodingConfig(**decoding))
    placement = place(open_checkpoint(model), config)
    plan = placement.plan
    fixed = sum(nbytes for what, nbytes in plan.device_bill.items() if what not in ("resident_layers", "slots", "neuron_cache"))
    readers = placement.planned.demand.reading.nbytes(2)
    num_host = {"host and disk": 2, "disk": 0}.get(where, 4)
    layer_nbytes = -(-plan.layer_nbytes // 4096) * 4096
    return {
        "device_memory": str(fixed + (4 if where == "resident" else 2) * plan.layer_nbytes),
        "host_memory": str(readers + plan.host_bill["embedding"] + num_host * layer_nbytes),
    }


def test_a_packed_layer_has_the_bytes_of_one_that_is_quantised_while_loading(kind: dict[str, Any], packed: str) -> None:
    assert layers_of(packed, {}) == layers_of(TINY, kind)


@pytest.mark.parametrize("where", PLACES)
def test_a_packed_model_answers_as_the_model_itself_wherever_its_layers_are(
    where: str, packed: str, at_load: Engine, load: Load
) -> None:
    engine = load(packed, **budgets(where, packed, mode="full"))
    assert len(engine.plan.disk_layers) == {"host and disk": 2, "disk": 4}.get(where, 0)
    for sampling in ({}, SAMPLED):
        expected = at_load.generate("hello", **ASKED, **sampling)
        found = engine.generate("hello", **ASKED, **sampling)
        assert found.token_ids == expected.token_ids
        assert found.link.bytes.full == found.passes.full * engine.plan.pass_nbytes
        assert engine.plan.layer_nbytes == at_load.plan.layer_nbytes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dtype" not in kind], indirect=True, ids=str)
@pytest.mark.parametrize("sparsity", ["griffin", "cats"])
def test_drafts_on_packed_layers_that_stay_on_disk_are_corrected_to_the_same_answer(
    sparsity: str, packed: str, at_load: Engine, load: Load
) -> None:
    decoding = {"mode": "sirius", "draft": "streamed", "sparsity": sparsity, "keep": 0.4, "window": 4}
    engine = load(packed, **decoding, **budgets("host and disk", packed, **decoding))
    assert engine.plan.disk_layers
    assert engine.generate("hello", **ASKED).token_ids == at_load.generate("hello", **ASKED).token_ids


def test_packed_layers_come_from_disk_to_a_device_with_memory_of_its_own(
    packed: str, at_load: Engine, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink = SimulatedUplink()
    monkeypatch.setattr("offload_sirius.engine.building.uplink_to", lambda device: uplink)
    engine = load(packed, **budgets("disk", packed, mode="full"))
    assert len(engine.plan.disk_layers) == 4
    assert engine.generate("hello", **ASKED).token_ids == at_load.generate("hello", **ASKED).token_ids
    engine.close()
    uplink.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dtype" not in kind], indirect=True, ids=str)
def test_hot_neurons_of_a_packed_model_draft_and_are_corrected_to_the_same_answer(
    packed: str, at_load: Engine, load: Load
) -> None:
    decoding = DecodingConfig(keep=0.4, window=4, draft="resident", prior=True)
    given = hot_budgets(decoding, model=packed, num_slots=3)
    engine = load(packed, mode="sirius", draft="resident", decoding=decoding, **given)
    assert engine.plan.hot is not None
    for _ in range(2):  # the second time with what the first has left of the neurons
        assert engine.generate("hello", **ASKED).token_ids == at_load.generate("hello", **ASKED).token_ids


def test_a_packed_model_s_own_types_are_those_it_runs_in(kind: dict[str, Any], packed: str, load: Load) -> None:
    config = load(packed).config
    asked = EngineConfig(**kind)
    assert (config.dtype, config.quantize) == (kind.get("dtype", "float32"), asked.quantize)
    assert config.quantize_head == asked.quantize_head
    assert config.weight_format == asked.weight_format
    assert load(packed, **kind).config == load(packed).config


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        (
            {},
            {"dtype": "bfloat16"},
            "--dtype is bfloat16, and m is packed in float32; leave it out, or pack the model anew with it",
        ),
        ({}, {"quantize": "int4"}, "--quantize is int4, and m is packed without; leave it out, or pack the model anew with it"),
        (
            {"quantize": "int4"},
            {"quantize": "int8"},
            "--quantize is int8, and m is packed with int4 in groups of 128; leave it out, or pack the model anew with it",
        ),
        (
            {"quantize": "int4"},
            {"quantize": "int4", "quantize_group": 32},
            "--quantize is int4 in groups of 32, and m is packed with int4 in groups of 128; "
            "leave it out, or pack the model anew with it",
        ),
    ],
)
def test_other_types_than_a_packed_model_has_are_refused(
    kind: dict[str, Any], asked: dict[str, Any], message: str, tmp_path: Path, load: Load
) -> None:
    model = packed_as(kind, tmp_path / "m")
    with pytest.raises(ConfigError) as caught:
        load(model, **asked)
    assert str(caught.value) == message


def test_layers_of_another_layout_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("offload_sirius.engine.packing.field_places", lambda layout: {"gate": (0, 1)})
        model = packed_as({}, tmp_path / "m")
    with pytest.raises(CheckpointError, match="m: its layers are laid out in another way than by this version of the program"):
        load(model)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_report_has_the_error_of_each_matrix(quantize: str, tmp_path: Path) -> None:
    config = EngineConfig(model=TINY, quantize=quantize)  # type: ignore[arg-type]
    pack(config, tmp_path / "m", NoProgress())
    report, checkpoint, form = report_of(str(tmp_path / "m")), open_checkpoint(TINY), config.weight_format
    assert form is not None
    assert len(report.errors) == checkpoint.spec.num_layers
    for layer, errors in enumerate(report.errors):
        assert set(errors) == {"q", "k", "v", "o", "gate", "up", "down"}
        for role, error in errors.items():
            matrix = torch.from_numpy(checkpoint.read(layer, role))  # type: ignore[arg-type]
            matrix = matrix.t().contiguous() if role == "down" else matrix
            assert error == quantization_error(matrix, quantise_rows(matrix, form), form)
            assert 0 < error.relative_rms < (0.01 if quantize == "int8" else 0.1)


def test_a_plain_copy_has_no_errors_to_report(tmp_path: Path) -> None:
    report = report_of(packed_as({}, tmp_path / "m"))
    assert (report.errors, report.quantize, report.quantize_group, report.num_layers) == ((), "none", None, 4)
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "m").iterdir() if path.name != INDEX_NAME)


def test_an_embedding_larger_than_a_layer_is_written_as_it_is(tmp_path: Path) -> None:
    source = f"{TINY}&vocab=40000"
    packed, model = open_checkpoint(packed_as({}, tmp_path / "m", source)), open_checkpoint(source)
    assert model.tensors[None, "embedding"].nbytes > 2 * PIECE_NBYTES > 10 * packed.infos[-1].nbytes
    for key in packed.tensors:
        np.testing.assert_array_equal(packed.read(*key), model.read(*key))


class Stop(BaseException):
    """Ctrl-C, or a bug."""


class Counted(NoProgress):
    """Stops when so many bytes have been read."""

    def __init__(self, most_nbytes: int | None = None) -> None:
        self.total_nbytes, self.nbytes, self._most_nbytes = 0, 0, most_nbytes

    def begin(self, what: str, total_nbytes: int) -> None:
        self.total_nbytes, self.nbytes = total_nbytes, 0

    def advance(self, nbytes: int) -> None:
        self.nbytes += nbytes
        if self._most_nbytes is not None and self.nbytes > self._most_nbytes:
            raise Stop


def test_an_interrupted_copy_goes_on_and_is_the_same(tiny_directory: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_directory), quantize="int4")
    whole, rest = Counted(), Counted()
    pack(config, tmp_path / "whole", whole)
    assert whole.nbytes == whole.total_nbytes == sum(info.nbytes for info in open_checkpoint(config.model).infos)
    with pytest.raises(Stop):
        pack(config, tmp_path / "m", Counted(whole.nbytes * 3 // 4))
    assert (tmp_path / "m" / MARKER_NAME).is_file()
    assert not (tmp_path / "m" / INDEX_NAME).exists()
    pack(config, tmp_path / "m", rest)
    assert 0 < rest.nbytes == rest.total_nbytes < whole.nbytes
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes()


def test_progress_of_verifying_counts_what_is_read(tmp_path: Path) -> None:
    progress = Counted()
    nbytes = verify_copy(packed_as({}, tmp_path / "m"), progress)
    assert progress.nbytes == progress.total_nbytes == nbytes > 4 * open_packed(tmp_path / "m", "m").index.job.layer_nbytes


def test_damage_is_named_in_one_line_and_packing_again_repairs_it(tmp_path: Path) -> None:
    model = packed_as({}, tmp_path / "m")
    path = tmp_path / "m" / layer_file_name(2)
    before = path.read_bytes()
    path.write_bytes(before[:-5] + bytes([before[-5] ^ 1]) + before[-4:])
    start = open_packed(tmp_path / "m", "m").files[path.name].head_nbytes
    with pytest.raises(CheckpointError) as caught:
        verify_copy(model, NoProgress())
    assert str(caught.value) == (
        f"{model}: is damaged: {path.name}: attention and records, bytes {start} to {len(before) - 1}; "
        "remove the files that are named and pack the model again"
    )
    path.unlink()
    packed_as({}, tmp_path / "m")
    assert path.read_bytes() == before
    verify_copy(model, NoProgress())


@pytest.mark.parametrize("part", ["attention", "records"])
def test_layers_of_another_size_are_refused_though_every_seal_is_right(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = packing.held_layout

    def wrong(*arguments: Any) -> LayerLayout:
        """Where tensors lie is as it must be, and the part has a row of bytes behind them."""
        layout = right(*arguments)
        return replace(layout, **{f"{part}_nbytes": layout.part_nbytes(part) + PACKED_ROW_NBYTES})  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(packing, "held_layout", wrong)
        model = packed_as({}, tmp_path / "m")
    checkpoint = open_packed(tmp_path / "m", "m")
    with pytest.raises(CheckpointError, match="m: its layers are laid out in another way than by this version of the program"):
        as_packed(EngineConfig(model=model), checkpoint)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"blocks": [{"q": "Q6_K"}] * 4}, r"q of layer 0 is said to be in Q6_K, rows of 256 weights a block, and is \[64, 64\]"),
        ({"blocks": [{}, {"down": "Q4_K"}, {}, {}]}, r"down of layer 1 is said to be in Q4_K, .* and is \[64, 192\]"),
        ({"blocks": [{"input_norm": "Q8_0"}] * 4}, r"input_norm of layer 0 is said to be in Q8_0, .* and is \[64\]"),
        ({"blocks": [{"q": "Q8_0"}] * 4, "quantize": "int8", "quantize_group": 64}, "its layers are in int8 and in blocks"),
        (
            {"outside_blocks": {"embedding": ("Q8_0", 96)}},
            "embedding is said to be in Q8_0 with rows of 96 bytes, which 64 weights",
        ),
        ({"outside_blocks": {"head": ("Q4_K", 144)}}, "head is said to be in Q4_K with rows of 144 bytes, which 64 weights"),
        ({"outside_blocks": {"final_norm": ("Q8_0", 68)}}, "final_norm is said to be in Q8_0 with rows of 68 bytes"),
    ],
    ids=str,
)
def test_blocks_that_a_matrix_cannot_be_in_are_refused_though_every_seal_is_right(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    job = replace(JOB, **{"source": SHORT, "quantize": "none", "quantize_group": None} | said)
    write_pack(tmp_path / "m", job, open_checkpoint(SHORT))
    with pytest.raises(CheckpointError, match=f"m: {message}.*pack the model anew"):
        as_packed(EngineConfig(model=str(tmp_path / "m")), open_checkpoint(str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("[1]", r"errors: holds \[1\], a JSON object is needed; .*"),
        ("{", r"errors: broken JSON at line 1 .*"),
        ('{"gate": 1}', r"errors: 'gate' is 1; a matrix with its errors is needed, pack the model again"),
        ('{"x": {}}', r"errors: 'x' is \{\}; a matrix with its errors is needed, pack the model again"),
        ('{"gate": {"largest": "a", "relative_rms": 0}}', r"errors of gate: largest is 'a'; it must be a number above -1"),
    ],
)
def test_errors_that_are_none_are_refused_though_every_seal_is_right(note: str, message: str, tmp_path: Path) -> None:
    model = packed_as({"quantize": "int8"}, tmp_path / "m")
    checkpoint = open_packed(tmp_path / "m", "m")
    file = checkpoint.files[layer_file_name(0)]
    checkpoint.files[layer_file_name(0)] = replace(file, notes={ERRORS_NOTE: note})
    with pytest.raises(CheckpointError, match=rf"{re.escape(model)}/{file.path.name}: {message}"):
        checkpoint.errors(0)


def test_a_packed_model_is_not_packed_again(tmp_path: Path) -> None:
    model = packed_as({}, tmp_path / "m")
    with pytest.raises(ConfigError, match="m: is packed already; give the model that it was made from, or leave --out out"):
        packed_as({}, tmp_path / "n", model)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("ask", [lambda model: verify_copy(model, NoProgress()), report_of])
def test_what_is_not_packed_cannot_be_verified_nor_reported_on(ask: Any) -> None:
    with pytest.raises(ConfigError, match=r"--model is synthetic:tiny\S+, which is not packed; give --out DIR to pack it"):
        ask(TINY)


def test_too_little_memory_is_refused_with_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = reading_cost(open_checkpoint(TINY), physical_cores()).nbytes(2) + PIECE_NBYTES
    monkeypatch.setattr("offload_sirius.engine.packing.free_host_nbytes", lambda: needed - 1)
    with pytest.raises(BudgetError, match=r"packing synthetic:tiny\S+ takes [\d.]+ MiB, [\d.]+ MiB are free; free some"):
        packed_as({}, tmp_path / "m")
    monkeypatch.setattr("offload_sirius.engine.packing.free_host_nbytes", lambda: needed)
    packed_as({}, tmp_path / "m")


def test_weights_that_differ_give_another_fingerprint(tmp_path: Path, tiny_directory: Path) -> None:
    seeds = [source_fingerprint(open_checkpoint(f"{TINY}&seed={seed}")) for seed in range(2)]
    assert seeds[0] != seeds[1]
    files = source_fingerprint(open_checkpoint(str(tiny_directory)))
    assert files == source_fingerprint(open_checkpoint(str(tiny_directory)))
    assert len({files, *seeds}) == 3


def test_a_real_gguf_file_packed_in_four_bits_answers_as_it_does_quantised_at_load(
    smollm2_gguf: Path, tmp_path: Path, load: Load
) -> None:
    kind = {"quantize": "int4", "dtype": "float32"}
    model = packed_as(kind, tmp_path / "m", str(smollm2_gguf))
    asked: dict[str, Any] = {"max_new_tokens": 6}
    expected = load(str(smollm2_gguf), **kind, max_context=128).generate("What is the capital of France?", **asked)
    found = load(model, max_context=128, host_memory="300MB", device_memory="200MB").generate(
        "What is the capital of France?", **asked
    )
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    assert open_model(model).end_token_ids == open_model(str(smollm2_gguf)).end_token_ids
