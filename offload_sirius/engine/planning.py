"""From settings, a model's headers and what a machine has to a plan and what may be expected of it. Without torch.

`build` decides by the same functions as `plan`, so that what one predicts the other does. Reads sizes, never weights; allocates
nothing. A device may also be described: then nothing of it is looked for on this machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from offload_sirius import machine
from offload_sirius.blocks import UNIT, BlockFormat
from offload_sirius.config import (
    DecodingConfig,
    Draft,
    DraftQuantize,
    EngineConfig,
    PlanConfig,
    ResidentFirst,
    Sparsity,
    tree_nodes,
)
from offload_sirius.engine.windows import ACCEPTANCES, acceptance_of_copy, acceptance_of_share, window_speeds
from offload_sirius.errors import BudgetError, CheckpointError, ConfigError
from offload_sirius.kernels.native import Name
from offload_sirius.model.costs import (
    CHUNK_SIZE,
    activation_nbytes,
    attended_pairs,
    kv_cache_nbytes,
    mixing_flops,
    position_tables_nbytes,
    quantized_attention_nbytes,
    quantized_kv_cache_nbytes,
    recorded_steps_nbytes,
    scored_rows,
    unpacking_nbytes,
)
from offload_sirius.quantization import KINDS, Kind, WeightFormat
from offload_sirius.rates import DtypeName, Rates, Stored, assumed_cpu_rates, assumed_gpu_rates
from offload_sirius.sparsity.costs import num_fetched, sparsity_nbytes
from offload_sirius.units import MIB, Size, format_size
from offload_sirius.weights.copy_plan import least_copy_device_nbytes, make_copy_plan
from offload_sirius.weights.hot_plan import least_hot_device_nbytes, make_hot_plan
from offload_sirius.weights.layout import PARTS, LayerLayout, Part, Slice, model_layout
from offload_sirius.weights.pieces import (
    blocks_by_layer,
    blocks_of,
    head_role,
    load_nbytes,
    quantising_nbytes,
    reading_cost,
    stored_part_nbytes,
)
from offload_sirius.weights.plan import (
    MAX_READERS,
    ROWS_QUANTISING_NBYTES,
    Budgets,
    Demand,
    HeadFormat,
    Plan,
    ReadingCost,
    as_flag,
    least_device_nbytes,
    make_plan,
)
from offload_sirius.weights.predict import (
    DRAFTS_OF_A_WINDOW,
    PassTime,
    Prediction,
    Setting,
    WindowSpeed,
    Work,
    bound_of,
    predict,
    predict_correction,
    predict_draft,
)
from offload_sirius_loaders.checkpoint import Checkpoint, PackedLayers
from offload_sirius_loaders.spec import ModelSpec

ELEMENT_NBYTES: dict[DtypeName, int] = {"bfloat16": 2, "float32": 4}

DEFAULT_CONTEXT = 4096
"""Positions planned for where nobody says how long prompt and answer will be."""

CARGO: dict[Sparsity | None, Slice] = {"griffin": "kept", "cats": "gate", None: "records"}
"""What a draft step takes of a layer of which slices can cross the link alone."""

HOST_RESERVE_NBYTES = 192 * MIB
"""Host memory left to the program itself: libraries that load late, scratch memory of matmuls, text."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The device that is planned for, and the host beside it."""

    device: str
    """cpu, cuda:N, or `described`."""
    model: str
    """What device and host call themselves: measured rates are kept under it."""
    own_memory: bool
    """The device has memory of its own."""
    free_device_nbytes: int | None
    """None: the device computes in host memory, or is described."""
    free_host_nbytes: int | None
    """What this program leaves of it for weights. None: described, nothing is known of it."""
    num_cores: int

    def rates_key(self, dtype: DtypeName) -> str:
        """What measured rates are kept under."""
        return f"{self.model}, {dtype}"


DESCRIBED = Hardware(device="described", model="", own_memory=True, free_device_nbytes=None, free_host_nbytes=None, num_cores=16)
"""A device with memory of its own that need not be here, in a PC: sizes and rates are those given, or assumed."""


def host_hardware() -> Hardware:
    """This machine without a GPU."""
    cores = machine.physical_cores()
    return Hardware(
        device="cpu",
        model=f"{machine.cpu_model()}, {cores} cores",
        own_memory=False,
        free_device_nbytes=None,
        free_host_nbytes=free_host_nbytes(),
        num_cores=cores,
    )


def free_host_nbytes() -> int:
    """Host memory that is free for weights."""
    return max(machine.free_host_nbytes() - HOST_RESERVE_NBYTES, 0)


def hardware_named(device: str) -> Hardware:
    """What --device stands for on this machine. Imports torch only where a GPU has to be asked. Raises DeviceError."""
    if device == "cpu" or (device == "auto" and not machine.may_have_gpu()):
        return host_hardware()
    from offload_sirius.engine.placement import find_device, hardware_of

    return hardware_of(find_device(device))


def hardware_asked_for(config: EngineConfig, asked: PlanConfig, stored: Stored) -> Hardware:
    """The device that a plan is asked for: one on this machine, or one that the flags describe.

    Rates of a device describe one; so do an absolute device memory and a link that this machine does not have. Raises
    ConfigError, DeviceError.
    """
    if asked.describes_device:
        if config.device != "auto":
            raise ConfigError(
                f"--device is {config.device}, and --device-tflops or --device-gbps describe another; give one of them"
            )
        return DESCRIBED
    here = hardware_named(config.device)
    if config.device == "auto" and config.link_gbps is not None and config.device_size.nbytes is not None:
        link = rates_of(here, "bfloat16", stored).link_bytes_per_second
        free = here.free_device_nbytes if here.own_memory else here.free_host_nbytes
        if config.link_gbps * 1e9 > link or config.device_size.nbytes > (free or 0):
            return DESCRIBED
    return here


def rates_of(hardware: Hardware, dtype: DtypeName, stored: Stored) -> Rates:
    """What was measured on this hardware, else what is assumed of its kind."""
    return stored.rates.get(hardware.rates_key(dtype)) or assumed_rates(hardware)


def assumed_rates(hardware: Hardware) -> Rates:
    """Of hardware nobody has measured."""
    return assumed_gpu_rates() if hardware.own_memory else assumed_cpu_rates(hardware.num_cores)


def rates_asked_for(hardware: Hardware, dtype: DtypeName, stored: Stored, config: EngineConfig, asked: PlanConfig) -> Rates:
    """The same, with those that were given. A link that is given is that of a described device; elsewhere it is emulated."""
    return rates_of(hardware, dtype, stored).given(
        link_bytes_per_second=_per_second(config.link_gbps if hardware == DESCRIBED else None, 1e9),
        disk_bytes_per_second=_per_second(asked.disk_gbps, 1e9),
        device_bytes_per_second=_per_second(asked.device_gbps, 1e9),
        device_flops_per_second=_per_second(asked.device_tflops, 1e12),
    )


def _per_second(given: float | None, unit: float) -> float | None:
    return None if given is None else given * unit


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Everything that is decided before a byte is allocated."""

    checkpoint: Checkpoint
    config: EngineConfig
    hardware: Hardware
    dtype: DtypeName
    context: int
    """Positions of the KV cache."""
    computed: bool
    """Synthetic weights: nothing is read before the first token, but for those that are streamed from disk."""
    layout: LayerLayout
    demand: Demand
    budgets: Budgets
    plan: Plan

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.checkpoint.spec

    @property
    def batch(self) -> int:
        """Answers that share the passes."""
        return self.config.parallel

    @property
    def quantized_kinds(self) -> list[Kind]:
        """Of all weights that are quantised."""
        forms = (self.layout.format, self.config.decoding.draft_format, self.config.head_format)
        return list(dict.fromkeys(form.kind for form in forms if form is not None))

    def with_more(self, *, device_nbytes: int = 0, host_nbytes: int = 0) -> Planned:
        """The same with larger budgets, whether or not this machine has as much."""
        budgets = Budgets(
            device_nbytes=self.budgets.device_nbytes + device_nbytes, host_nbytes=self.budgets.host_nbytes + host_nbytes
        )
        return replace(self, budgets=budgets, plan=plan_for(self.spec, self.layout, self.demand, budgets))

    @property
    def unpacks(self) -> bool:
        """Whether any matrices are other than plain numbers."""
        return bool(self.quantized_kinds) or self._has_blocks

    @property
    def libraries(self) -> list[Name]:
        """Of functions in C that compute on them, or put them in place in every pass."""
        needed: dict[Name, bool] = {
            "products": bool(self.quantized_kinds),
            "blocks": self._has_blocks,
            "rows": bool(self.plan.disk_layers),
        }
        return [name for name, is_needed in needed.items() if is_needed]

    @property
    def _has_blocks(self) -> bool:
        forms = (self.demand.head_format, self.demand.embedding_format)
        return bool(self.layout.blocks) or any(isinstance(form, BlockFormat) for form in forms)

    @property
    def records_drafts(self) -> bool:
        """Drafts are lines that are resident in every layer: steps which a device can record."""
        hot = self.plan.hot
        return hot is not None and len(hot.layers) == self.spec.num_layers and records_drafts(self.config)

    @property
    def stored_nbytes(self) -> dict[Part, int]:
        """Bytes of each part of a layer as its files have them; where layers differ, the mean."""
        layers = range(self.spec.num_layers if self.layout.by_layer else 1)
        return {part: sum(stored_part_nbytes(self.checkpoint, layer, part) for layer in layers) // len(layers) for part in PARTS}

    def setting(self, rates: Rates) -> Setting:
        """What a prediction needs."""
        emulated = self.config.link_gbps if self.hardware != DESCRIBED else None
        return Setting(
            plan=self.plan,
            layout=self.layout,
            stored_nbytes=self.stored_nbytes,
            load_nbytes=None if self.computed and not self.plan.disk_layers else load_nbytes(self.checkpoint, self.plan),
            own_memory=self.hardware.own_memory,
            paced_bytes_per_second=_per_second(emulated, 1e9),
            rates=rates,
            head_format=self.demand.head_format,
            overlap=self.config.decoding.overlap,
        )

    def predict(self, rates: Rates, prompt_tokens: int, decoding: DecodingConfig | None = None) -> Prediction:
        """What may be expected for a prompt of that many tokens and an answer that fills the context.

        decoding: how it is decoded; None: as was planned for.
        """
        decoding, setting = decoding or self.config.decoding, self.setting(rates)
        full = predict(setting, self._step_work(prompt_tokens, 1), self._prompt_work(prompt_tokens))
        if not decoding.drafts:
            return full
        num_leaves = decoding.tree_width if decoding.mode == "sirius" else 1
        drafting = self._draft_work(prompt_tokens, num_leaves, decoding)
        draft = predict_draft(setting, drafting)
        if decoding.mode == "sparse":
            return replace(full, seconds_per_token=draft.seconds / self.batch, bound=draft.bill.bound, draft=draft)

        def correction(window: int) -> PassTime:
            correcting = self._step_work(prompt_tokens, tree_nodes(window, decoding.tree_width))
            num_drafts = DRAFTS_OF_A_WINDOW if self.plan.hot is None else window - 1
            return predict_correction(setting, correcting, drafting, draft.seconds, num_drafts)

        windows = window_speeds(decoding, draft.seconds, correction, self.batch, self._expected_acceptance(decoding))
        assumed = windows[0]
        return replace(
            full,
            seconds_per_token=assumed.seconds_per_token,
            bound=bound_of((assumed.window - 1, draft.bill), (1, assumed.correction.bill)),
            draft=draft,
            windows=windows,
        )

    def _expected_acceptance(self, decoding: DecodingConfig) -> float:
        """Share of drafted tokens that stand, as far as the draft tells."""
        hot, num_neurons = self.plan.hot, self.spec.ffn_width
        if hot is None:
            return ACCEPTANCES[0]
        if hot.draft_format is not None:
            return acceptance_of_copy(hot.draft_format.kind, hot.num_hot / num_neurons)
        return acceptance_of_share(decoding.num_drafted(num_neurons, hot.num_hot) / decoding.num_kept(num_neurons))

    def _step_work(self, prompt_tokens: int, num_tokens: int) -> Work:
        """So many tokens of each sequence at once, in the middle of the answer."""
        positions = (prompt_tokens + self.context) // 2
        num_rows = self.batch * num_tokens
        return Work(
            num_rows=num_rows,
            num_chunks=1,
            num_head_rows=num_rows,
            mixing_nbytes=self._layer_cache_nbytes(positions),
            mixing_flops=mixing_flops(self.spec, num_rows * positions),
            cargo="records" if self.plan.hot is None or self.plan.hot.draft_format else "cold",
        )

    def _draft_work(self, prompt_tokens: int, num_leaves: int, decoding: DecodingConfig) -> Work:
        """The same of a draft step. Sequences that are drafted together share a set of neurons, as the leaves of a tree do."""
        num_neurons, sparsity = self.spec.ffn_width, sparsity_of(decoding, self.spec)
        step = self._step_work(prompt_tokens, num_leaves)
        if self.plan.hot is not None:
            copied = self.plan.hot.draft_format is not None
            num_drafted = None if copied else decoding.num_drafted(num_neurons, self.plan.hot.num_hot)
            return replace(step, cargo="hot", num_drafted=num_drafted)
        num_needed = self.config.decoding.num_kept(num_neurons) if sparsity == "cats" else 0
        return replace(
            step,
            cargo=CARGO[sparsity],
            num_fetched=num_fetched(num_needed, self.plan.num_cached_neurons, num_neurons),
        )

    def _prompt_work(self, prompt_tokens: int) -> Work:
        return Work(
            num_rows=self.batch * prompt_tokens,
            num_chunks=self.batch * -(-prompt_tokens // CHUNK_SIZE),
            num_head_rows=self.batch,
            mixing_nbytes=self._layer_cache_nbytes(prompt_tokens),
            mixing_flops=mixing_flops(self.spec, self.batch * attended_pairs(prompt_tokens)),
        )

    def _layer_cache_nbytes(self, positions: int) -> int:
        nbytes = cache_nbytes(self.config, self.spec, positions, ELEMENT_NBYTES[self.dtype])
        return nbytes // self.spec.num_layers


def plan_model(checkpoint: Checkpoint, config: EngineConfig, hardware: Hardware, *, computed: bool | None = None) -> Planned:
    """Decide. config: of a packed model as `as_packed` gives it. computed: the weights are in no file; default: as the checkpoint
    says.

    Raises BudgetError with the smallest budget that works, and the longest context that does with what there is; ConfigError.
    """
    assert config == as_packed(config, checkpoint)
    checkpoint = as_held(checkpoint, config)
    spec, dtype, decoding = checkpoint.spec, dtype_of(config, checkpoint.spec), config.decoding
    context, sparse = context_of(config, spec), sparsity_of(decoding, spec)
    num_gathered = decoding.num_kept(spec.ffn_width) if sparse == "griffin" and decoding.draft != "resident" else 0
    layout = held_layout(checkpoint, config, num_gathered)
    if decoding.draft_format is not None and layout.blocks:
        raise ConfigError(
            f"--draft-quantize is {decoding.draft_quantize}, and {spec.name} is held in the blocks of its file, which are not "
            "quantised once more; use --draft-quantize none, or --no-keep-blocks"
        )
    # Looks at every tensor of the checkpoint, so only once.
    reading = reading_cost(checkpoint, hardware.num_cores)
    demand_of = partial(_demand, checkpoint, config, hardware, layout, reading=reading)
    demand = demand_of(context)
    try:
        budgets = _budgets(spec, layout, demand, config, hardware)
        plan = plan_for(spec, layout, demand, budgets)
    except BudgetError as error:
        device_nbytes = _device_budget(reading, config, hardware)
        least = partial(_least_device_nbytes, spec, layout)
        # The longer the context the more it takes: as many fit as there are in front of the first that takes too much.
        fitting = bisect_right(range(1, context), device_nbytes, key=lambda shorter: least(demand_of(shorter)))
        if not fitting or least(demand) <= device_nbytes:
            raise
        raise BudgetError(f"{error}, or --max-context {fitting} at most") from None
    _require_free(plan, hardware)
    return Planned(
        checkpoint=checkpoint,
        config=config,
        hardware=hardware,
        dtype=dtype,
        context=context,
        computed=checkpoint.path is None if computed is None else computed,
        layout=layout,
        demand=demand,
        budgets=budgets,
        plan=plan,
    )


def _demand(
    checkpoint: Checkpoint,
    config: EngineConfig,
    hardware: Hardware,
    layout: LayerLayout,
    context: int,
    *,
    reading: ReadingCost,
) -> Demand:
    """What a plan has to make room for, with so many positions of each sequence."""
    spec, decoding, element_nbytes = checkpoint.spec, config.decoding, layout.element_nbytes
    sparse, num_kept = sparsity_of(decoding, spec), decoding.num_kept(spec.ffn_width)
    resident_draft = sparse is not None and decoding.draft == "resident"
    copied = decoding.draft_format is not None
    recorded = resident_draft and hardware.own_memory and records_drafts(config)
    outside = blocks_of(checkpoint, None)
    unpacks = layout.unpacks or bool(outside) or config.head_format is not None or copied
    return Demand(
        kv_cache_nbytes=cache_nbytes(config, spec, context, element_nbytes),
        position_tables_nbytes=position_tables_nbytes(spec, context, element_nbytes, config.parallel),
        activation_nbytes=computing_nbytes(config, spec, context, element_nbytes, unpacks=unpacks)
        + (recorded_nbytes(config, spec, context, element_nbytes) if recorded else 0),
        reading=reading,
        embedding_on_device=spec.tied_head and config.head_format is None,
        rows_quantising_nbytes=ROWS_QUANTISING_NBYTES if copied or _quantises_head(config, checkpoint) else 0,
        head_format=head_format_of(checkpoint, config),
        embedding_format=outside.get("embedding"),
        staged=hardware.own_memory,
        quantising_nbytes=quantising_nbytes(spec, element_nbytes) if layout.format and not checkpoint.packed else 0,
        num_shared_buffers=config.shared_host_buffers,
        sparsity_nbytes=sparsity_nbytes(spec, decoding, element_nbytes),
        num_cached_neurons=num_kept if sparse == "cats" else 0,
        num_hot=spec.ffn_width if copied else num_kept if resident_draft else 0,
        draft_format=decoding.draft_format,
        hot_layers_first=decoding.resident_first == "layers",
        tables_in_codes=checkpoint.packed is None and any("down_table" in each.fields for each in (layout, *layout.by_layer)),
    )


def _least_device_nbytes(spec: ModelSpec, layout: LayerLayout, demand: Demand) -> int:
    if demand.draft_format is not None:
        return least_copy_device_nbytes(spec, layout, demand)
    return (least_hot_device_nbytes if demand.num_hot else least_device_nbytes)(spec, layout, demand)


def as_held(checkpoint: Checkpoint, config: EngineConfig) -> Checkpoint:
    """The checkpoint as it is read: its blocks, where it has some, as they are or as numbers."""
    return checkpoint.in_blocks() if config.keep_blocks and config.quantize == "none" else checkpoint


def head_format_of(checkpoint: Checkpoint, config: EngineConfig) -> HeadFormat:
    """How the head is held of a checkpoint as it is read. Raises ConfigError for blocks that were to be quantised."""
    blocks = blocks_of(checkpoint, None).get(head_role(checkpoint))
    if config.head_format is not None and blocks is not None:
        raise ConfigError(
            f"--quantize-head is {config.quantize_head}, and {checkpoint.spec.name} is held in the blocks of its file, its "
            "head too; use --quantize-head none, or --no-keep-blocks"
        )
    return config.head_format or blocks


def _quantises_head(config: EngineConfig, checkpoint: Checkpoint) -> bool:
    """Whether the head is quantised while loading."""
    packed = checkpoint.packed is not None and checkpoint.packed.quantize_head != "none"
    return config.head_format is not None and not packed


def computing_nbytes(config: EngineConfig, spec: ModelSpec, num_tokens: int, element_nbytes: int, *, unpacks: bool) -> int:
    """Device bytes that passes over prompts of that many tokens together, and over windows behind them, take beside what stays
    there.

    unpacks: matrices are not plain numbers.
    """
    observed, step_rows = sparsity_of(config.decoding, spec) is not None, config.step_rows
    nbytes = activation_nbytes(spec, num_tokens, element_nbytes, step_rows=step_rows, observed=observed)
    if config.kv_dtype == "int8":
        nbytes += quantized_attention_nbytes(spec, max(min(CHUNK_SIZE, num_tokens), step_rows), num_tokens)
    return nbytes + (unpacking_nbytes(spec, element_nbytes, step_rows) if unpacks else 0)


def cache_nbytes(config: EngineConfig, spec: ModelSpec, num_positions: int, element_nbytes: int) -> int:
    """Device bytes of keys and values, of that many positions of each answer."""
    if config.kv_dtype == "int8":
        return quantized_kv_cache_nbytes(spec, config.parallel, num_positions)
    return kv_cache_nbytes(spec, config.parallel, num_positions, element_nbytes)


def recorded_nbytes(config: EngineConfig, spec: ModelSpec, capacity: int, element_nbytes: int) -> int:
    """Device bytes of draft steps that are recorded."""
    attention = quantized_attention_nbytes(spec, 1, capacity) if config.kv_dtype == "int8" else 0
    return recorded_steps_nbytes(spec, capacity, element_nbytes) + attention


def scored_rows_of(config: EngineConfig, spec: ModelSpec, num_tokens: int, element_nbytes: int) -> int:
    """Tokens of a prompt whose logits there is room for at once, where computing_nbytes was planned for so many tokens."""
    observed, step_rows = sparsity_of(config.decoding, spec) is not None, config.step_rows
    return scored_rows(spec, num_tokens, element_nbytes, step_rows=step_rows, observed=observed)


def plan_for(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets) -> Plan:
    """The plan of the kind that is asked for. Raises BudgetError."""
    if demand.draft_format is not None:
        return make_copy_plan(spec, layout, demand, budgets)
    return (make_hot_plan if demand.num_hot else make_plan)(spec, layout, demand, budgets)


def sparsity_of(decoding: DecodingConfig, spec: ModelSpec) -> Sparsity | None:
    """How draft steps of that model are sparse; None where there are none, or they keep all neurons.

    A copy for drafts has all neurons or some, as there is room.
    """
    if decoding.draft_format is not None:
        return decoding.sparsity
    keeps_all = decoding.num_kept(spec.ffn_width) == spec.ffn_width
    return decoding.sparsity if decoding.drafts and not keeps_all else None


def records_drafts(config: EngineConfig) -> bool:
    """Whether draft steps that move nothing are recorded where the device can. Those of a tree have ever other shapes."""
    return config.cuda_graphs and config.decoding.tree_width == 1


def as_packed(config: EngineConfig, checkpoint: Checkpoint) -> EngineConfig:
    """The settings, with those filled in that a packed model has decided: the types in which its layers are held.

    Raises ConfigError where others are asked for, CheckpointError where its layers are laid out in another way than here.
    """
    packed = checkpoint.packed
    if packed is None:
        return config
    name = checkpoint.spec.name
    if config.dtype not in ("auto", packed.dtype):
        raise ConfigError(
            f"--dtype is {config.dtype}, and {name} is packed in {packed.dtype}; leave it out, or pack the model anew with it"
        )
    asked = (config.quantize, config.quantize_group or packed.quantize_group)
    if config.quantize != "none" and asked != (packed.quantize, packed.quantize_group):
        own = "is packed without" if packed.quantize == "none" else f"is packed with {packed.quantize}"
        group = "" if packed.quantize_group is None else f" in groups of {packed.quantize_group}"
        wanted = config.quantize if config.quantize_group is None else f"{config.quantize} in groups of {config.quantize_group}"
        raise ConfigError(f"--quantize is {wanted}, and {name} {own}{group}; leave it out, or pack the model anew with it")
    if (packed.blocks or blocks_of(checkpoint, None)) and not config.keep_blocks:
        raise ConfigError(
            f"--no-keep-blocks is given, and {name} is packed in blocks; leave it out, or pack the model anew with it"
        )
    config = replace(
        config,
        dtype=packed.dtype,  # type: ignore[arg-type]  # checked by EngineConfig, as is the next
        quantize=packed.quantize,  # type: ignore[arg-type]
        quantize_group=packed.quantize_group,
        quantize_head=config.quantize_head if packed.quantize_head == "none" else packed.quantize_head,  # type: ignore[arg-type]
    )
    _require_whole_blocks(checkpoint)
    layout = held_layout(checkpoint, config)
    has_head = packed.quantize_head == "none" or _has_head(checkpoint, config)
    if packed.fields != field_places(layout) or not _has_parts(packed, layout) or not has_head:
        raise CheckpointError(
            f"{checkpoint.path}: its layers are laid out in another way than by this version of the program; pack the model anew"
        )
    return config


def _has_head(checkpoint: Checkpoint, config: EngineConfig) -> bool:
    """Whether rows of a quantised head have the bytes that they have here."""
    assert config.head_format is not None
    return checkpoint.tensors[None, head_role(checkpoint)].shape[-1] == config.head_format.row_nbytes(checkpoint.spec.width)


def _require_whole_blocks(checkpoint: Checkpoint) -> None:
    """An index may say anything of a packed model's blocks. Raises CheckpointError where a matrix cannot be in them."""
    spec, packed = checkpoint.spec, checkpoint.packed
    assert packed is not None
    anew = "pack the model anew"
    if packed.quantize != "none" and any(packed.blocks):
        raise CheckpointError(
            f"{checkpoint.path}: its layers are in {packed.quantize} and in blocks; they are in one of both, {anew}"
        )
    shapes = spec.layer_roles()
    for layer in range(spec.num_layers):
        for role, form in blocks_of(checkpoint, layer).items():
            what, shape = f"{checkpoint.path}: {role} of layer {layer} is said to be in {form.name}", shapes[role]
            if len(shape) != 2 or shape[1] % form.block:
                raise CheckpointError(f"{what}, rows of {form.block} weights a block, and is {list(shape)}; {anew}")
            if role == "down" and shape[0] % UNIT:
                raise CheckpointError(f"{what}, which goes with a multiple of {UNIT} outputs, and has {shape[0]}; {anew}")
    for role, form in blocks_of(checkpoint, None).items():
        found, what = checkpoint.tensors[None, role].row_nbytes, f"{checkpoint.path}: {role} is said to be in {form.name}"
        if role not in ("embedding", "head") or spec.width % form.block or found != form.row_nbytes(spec.width):
            raise CheckpointError(f"{what} with rows of {found} bytes, which {spec.width} weights do not have; {anew}")


def held_layout(checkpoint: Checkpoint, config: EngineConfig, num_kept: int = 0) -> LayerLayout:
    """How layers lie in memory. checkpoint: as it is read. num_kept: see `layer_layout`."""
    element_nbytes = ELEMENT_NBYTES[dtype_of(config, checkpoint.spec)]
    return model_layout(checkpoint.spec, element_nbytes, num_kept, config.weight_format, blocks_by_layer(checkpoint))


def _has_parts(packed: PackedLayers, layout: LayerLayout) -> bool:
    """Whether each part of each layer is as long as in that layout."""
    return all(info.nbytes == layout.layer(layer).part_nbytes(part) for (layer, part), info in packed.parts.items())


def field_places(layout: LayerLayout) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of a layer -> byte at which it begins, then its shape."""
    return {name: (field.offset, *field.shape) for name, field in layout.fields.items()}


def dtype_of(config: EngineConfig, spec: ModelSpec) -> DtypeName:
    """The type weights are held and computed in. auto: float32 for what is stored so, bfloat16 for everything shorter."""
    if config.dtype == "auto":
        return "float32" if spec.stored_dtype == "F32" else "bfloat16"
    return config.dtype


def context_of(config: EngineConfig, spec: ModelSpec) -> int:
    """Positions to plan for. Raises ConfigError for more than the model has."""
    if config.max_context is None:
        return min(DEFAULT_CONTEXT, spec.max_positions)
    if config.max_context > spec.max_positions:
        raise ConfigError(f"--max-context is {config.max_context}; {spec.name} has {spec.max_positions} positions")
    return config.max_context


def require_prompt(config: EngineConfig, spec: ModelSpec, prompt_tokens: int) -> None:
    """Raises ConfigError for a prompt that leaves no room for an answer."""
    context = context_of(config, spec)
    if prompt_tokens > context:
        raise ConfigError(f"--prompt-tokens is {prompt_tokens}, the context has {context} positions; give a larger --max-context")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a model, and how fast it would be."""

    planned: Planned
    prediction: Prediction


Consider = Callable[[EngineConfig], Candidate]
"""Plans and predicts. Raises BudgetError, ConfigError."""


def candidates(config: EngineConfig, spec: ModelSpec, consider: Consider) -> list[Candidate]:
    """What --auto chooses from, the fastest first; without it the one thing that was asked for.

    Those that cannot be, as memory is too small or the file is of the wrong kind, are left out; where it is so for all, raises
    the BudgetError or ConfigError of the first. Left out are also those whose plan is another one's: nothing comes first where
    everything fits.
    """
    considered = [_consider(each, consider) for each in alternatives(config, spec)]
    plans = list[tuple[DtypeName, Plan]]()
    found = list[Candidate]()
    for each in considered:
        if isinstance(each, Candidate) and (each.planned.dtype, each.planned.plan) not in plans:
            plans.append((each.planned.dtype, each.planned.plan))
            found.append(each)
    if not found:
        raise next(each for each in considered if not isinstance(each, Candidate))
    return sorted(found, key=lambda candidate: candidate.prediction.seconds_per_token)


def _consider(config: EngineConfig, consider: Consider) -> Candidate | BudgetError | ConfigError:
    try:
        return consider(config)
    except (BudgetError, ConfigError) as error:
        return error


def alternatives(config: EngineConfig, spec: ModelSpec) -> list[EngineConfig]:
    """Settings with everything settled that may be chosen by prediction; what it would be if it could not comes first."""
    usual = dtype_of(config, spec)
    dtypes = [usual]
    if config.auto and config.dtype == "auto":
        dtypes += [dtype for dtype in ELEMENT_NBYTES if dtype != usual]
    decodings = [way for each in _copies(config) for way in _ways_to_draft(each, spec)]
    return [replace(config, dtype=dtype, decoding=decoding) for dtype in dtypes for decoding in decodings]


def _copies(config: EngineConfig) -> list[DecodingConfig]:
    """Of which copies drafts may be made, none of them first."""
    decoding = config.decoding
    if decoding.draft_quantize != "auto":
        return [decoding]
    kinds: list[DraftQuantize] = ["none"]
    if decoding.drafts:
        own_bits = 16 if config.weight_format is None else config.weight_format.bits
        kinds += [kind for kind in KINDS if WeightFormat(kind=kind).bits < own_bits]
    return [replace(decoding, draft_quantize=kind) for kind in kinds]


def _ways_to_draft(decoding: DecodingConfig, spec: ModelSpec) -> list[DecodingConfig]:
    """Where drafts may live, and, on the device, what may come first."""
    drafts: list[Draft] = [decoding.draft]
    if decoding.draft_format is not None:
        return [replace(decoding, draft="resident", resident_first="neurons")]
    if decoding.draft == "auto":
        drafts = ["streamed", "resident"] if sparsity_of(decoding, spec) == "griffin" else ["streamed"]
    firsts: list[ResidentFirst] = ["neurons", "layers"] if decoding.resident_first == "auto" else [decoding.resident_first]
    return [
        replace(decoding.drafting_from(draft), resident_first=first)
        for draft in drafts
        for first in (firsts if draft == "resident" else firsts[:1])
    ]


def plan_figures(planned: Planned) -> dict[str, Any]:
    """A plan as plain values."""
    plan = planned.plan
    return {
        "device": planned.hardware.device,
        "dtype": planned.dtype,
        "context": planned.context,
        **asdict(plan),
        "device_nbytes": plan.device_nbytes,
        "host_nbytes": plan.host_nbytes,
        "pass_nbytes": plan.pass_nbytes,
    }


def prediction_figures(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values."""
    return {
        "seconds_per_token": prediction.seconds_per_token,
        "seconds_per_pass": prediction.seconds_per_pass,
        "first_token_seconds": prediction.first_token_seconds,
        "load_seconds": prediction.load_seconds,
        "bound": prediction.bound,
        "draft": None if prediction.draft is None else _pass_figures(prediction.draft),
        "correction": _correction_figures(prediction.windows[0]) if prediction.windows else None,
        "by_acceptance": [_window_figures(each) for each in prediction.windows],
        "sources": dict(prediction.sources),
    }


def _pass_figures(time: PassTime) -> dict[str, Any]:
    return {"seconds": time.seconds, "nbytes": time.nbytes, "bound": time.bill.bound}


def _correction_figures(speed: WindowSpeed) -> dict[str, Any]:
    """Of the window for the acceptance that is assumed."""
    return {"acceptance": speed.acceptance, "window": speed.window, **_pass_figures(speed.correction)}


def _window_figures(speed: WindowSpeed) -> dict[str, Any]:
    return {
        "acceptance": speed.acceptance,
        "window": speed.window,
        "tokens_per_window": speed.num_tokens,
        "seconds_per_token": speed.seconds_per_token,
        "tokens_per_second": 1 / speed.seconds_per_token,
    }


def _budgets(spec: ModelSpec, layout: LayerLayout, demand: Demand, config: EngineConfig, hardware: Hardware) -> Budgets:
    """Without a GPU the device's budget and the host's are parts of one memory: the host's share is of what the device leaves,
    and the device's of what the readers leave, since a disk read by too few of them costs more than a few residents save."""
    device_nbytes, free_host = _device_budget(demand.reading, config, hardware), hardware.free_host_nbytes
    if free_host is None:
        host_nbytes = _absolute("host-memory", config.host_memory, config.host_size)
        return Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes)
    if hardware.free_device_nbytes is not None:
        return Budgets(device_nbytes=device_nbytes, host_nbytes=config.host_size.resolve(free_host))
    unlimited = Budgets(device_nbytes=device_nbytes, host_nbytes=1 << 62)
    # Where layers stay on disk there are no caches of neurons, and resident layers may take more than those would have.
    demands = (demand, replace(demand, num_cached_neurons=0))
    most_nbytes = max(plan_for(spec, layout, each, unlimited).device_nbytes for each in demands)
    _require(("device",), most_nbytes, free_host - _for_readers(demand.reading, free_host))
    return Budgets(device_nbytes=device_nbytes, host_nbytes=config.host_size.resolve(free_host - most_nbytes))


def _device_budget(reading: ReadingCost, config: EngineConfig, hardware: Hardware) -> int:
    free_host, free_device = hardware.free_host_nbytes, hardware.free_device_nbytes
    if free_host is None:
        return _absolute("device-memory", config.device_memory, config.device_size)
    if free_device is None:
        free_device = free_host - _for_readers(reading, free_host)
    return config.device_size.resolve(free_device)


def _for_readers(reading: ReadingCost, free_host_nbytes: int) -> int:
    """Host memory that a device which computes in it leaves to the readers."""
    return min(reading.nbytes(MAX_READERS), free_host_nbytes // 4)


def _absolute(flag: str, text: str, size: Size) -> int:
    if size.nbytes is None:
        raise ConfigError(f"--{flag} is {text}, a share of what is free; a device that is described needs a size, such as 24GiB")
    return size.nbytes


def _require_free(plan: Plan, hardware: Hardware) -> None:
    if hardware.free_host_nbytes is None:
        return
    if hardware.free_device_nbytes is None:
        _require(("device", "host"), plan.device_nbytes + plan.host_nbytes, hardware.free_host_nbytes)
        return
    _require(("device",), plan.device_nbytes, hardware.free_device_nbytes)
    _require(("host",), plan.host_nbytes, hardware.free_host_nbytes)


def _require(places: tuple[str, ...], needed_nbytes: int, free_nbytes: int) -> None:
    if needed_nbytes > free_nbytes:
        flags = " and ".join(f"--{place}-memory" for place in places)
        together = "together " if len(places) > 1 else ""
        raise BudgetError(
            f"{' and '.join(places)} memory: the plan takes {format_size(needed_nbytes)}, {format_size(free_nbytes)} are free; "
            f"give smaller {flags}, {together}at most {as_flag(_rounded_down(free_nbytes))}"
        )


def _rounded_down(nbytes: int) -> int:
    """Less by what as_flag rounds up, which is at most a hundredth, so that what it says is not above nbytes."""
    return nbytes * 99 // 100
