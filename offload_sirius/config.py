"""Every setting, its default and its range. The command line and the Python API both read them here, and only here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from offload_sirius.errors import ConfigError
from offload_sirius.quantization import DEFAULT_GROUPS, GROUPS, Kind, WeightFormat
from offload_sirius.units import Size, parse_size

DEFAULT_MODEL = "smollm2-135m"

Mode = Literal["full", "sparse", "sirius"]
MODES: tuple[Mode, ...] = get_args(Mode)

Sparsity = Literal["griffin", "cats"]
SPARSITIES: tuple[Sparsity, ...] = get_args(Sparsity)

Draft = Literal["auto", "resident", "streamed"]
DRAFTS: tuple[Draft, ...] = get_args(Draft)

ResidentFirst = Literal["auto", "neurons", "layers"]
RESIDENT_FIRSTS: tuple[ResidentFirst, ...] = get_args(ResidentFirst)

Accept = Literal["exact", "threshold"]
ACCEPTS: tuple[Accept, ...] = get_args(Accept)

AUTO = "auto"

MIN_WINDOW, MAX_AUTO_WINDOW = 2, 64
"""A window holds the full model's last token and at least one drafted one; `auto` looks no further than the second number."""

MAX_TREE_NODES = 512
"""Tokens that one correction verifies at most: logits of all of them are computed at once."""

MAX_LOOKUP_NODES = 16
"""Of them tokens at most that were looked up and not drafted."""

MAX_LOGPROBS = 20
"""Likeliest tokens beside each token of an answer at most."""

MAX_PARALLEL = 64
"""Answers that are written together at most: of a correction's tokens each has eight then."""

Dtype = Literal["auto", "bfloat16", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

KVDtype = Literal["auto", "int8"]
KV_DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)

Quantize = Literal["none", "int8", "int4"]
QUANTIZES: tuple[Quantize, ...] = get_args(Quantize)

DraftQuantize = Literal["none", "int8", "int4", "auto"]
DRAFT_QUANTIZES: tuple[DraftQuantize, ...] = get_args(DraftQuantize)

DRAFT_GROUPS: dict[Kind, int] = {"int8": 64, "int4": 32}
"""Weights of a copy for drafts that share a scale. A copy of SmolLM2-135M in 4 bits has 84 % of its tokens accepted with groups
of 32 and 80 % with groups of 128, which take 12 % fewer bytes."""

QuantizeHead = Literal["none", "int8"]
QUANTIZE_HEADS: tuple[QuantizeHead, ...] = get_args(QuantizeHead)


def help_of(config: type, name: str) -> str:
    """The help text of a field, which the command line prints."""
    for each in fields(config):
        if each.name == name:
            return str(each.metadata["help"])
    raise AssertionError(f"{config.__name__} has no field {name}")


def default_of(config: type, name: str) -> Any:
    """The default of a field, which the command line offers."""
    for each in fields(config):
        if each.name == name:
            return each.default
    raise AssertionError(f"{config.__name__} has no field {name}")


def names_of(config: type) -> frozenset[str]:
    """The names of a config's fields."""
    return frozenset(each.name for each in fields(config))


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _require(condition: bool, flag: str, found: object, needed: str) -> None:
    if not condition:
        raise ConfigError(f"--{flag} is {found}; it must be {needed}")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tokens are found: by the full model alone, by sparse drafts, or by drafts that the full model corrects."""

    mode: Mode = _setting(
        "sirius",
        "full: the plain model. sparse: drafts alone, lossy. sirius: drafts, corrected by the full model a window at once.",
    )
    sparsity: Sparsity = _setting(
        "griffin", "griffin: one set of neurons a prompt, chosen by it. cats: a set for every token, chosen by its gate."
    )
    keep: float = _setting(0.5, "Share of each layer's neurons that a draft step uses; 1 is the full model.")
    cats_threshold: str | float | None = _setting(
        None,
        "cats keeps gates above a threshold, not a fixed number of them: a number, or auto, which takes from the prompt the one "
        "that keeps --keep of the neurons. Default: the --keep largest.",
    )
    window: int | str = _setting(
        AUTO, f"Tokens that a correction verifies, {MIN_WINDOW} or more; auto chooses by acceptance and measured times."
    )
    accept: Accept = _setting(
        "exact", "exact: the full model's own tokens. threshold: what it finds likely enough; lossy, greedy only."
    )
    threshold: float = _setting(0.1, "Probability from which --accept threshold takes a drafted token.")
    draft: Draft = _setting(
        "auto",
        "resident: each layer's kept neurons stay on the device, or those of as many layers as fit; drafts bring nothing of such "
        "layers and corrections only the rest (griffin). streamed: drafts bring them. auto: what is predicted to be faster.",
    )
    draft_quantize: DraftQuantize = _setting(
        "none",
        "int8, int4: let drafts compute on a copy in 8 or 4 bits of as many neurons as the device has room for, whatever --keep; "
        "corrections then bring all of each layer. none: drafts share the model's own neurons. auto: what is predicted to be "
        "faster.",
    )
    resident_first: ResidentFirst = _setting(
        "auto",
        "What comes first where the device has no room for all that a resident draft keeps. neurons: some of every layer. "
        "layers: all of them, of some layers. auto: what is predicted to be faster.",
    )
    refresh: bool = _setting(True, "Let corrections change which neurons a resident draft keeps.")
    refresh_decay: float = _setting(0.7, "What earlier windows count for beside the last one, when it is decided which to keep.")
    prior: bool | None = _setting(
        None,
        "Let earlier runs, kept in the cache folder, have a say in which neurons a resident draft keeps, this one in later ones. "
        "Default: with --mode sirius and --accept exact, where only speed depends on it; elsewhere the text would.",
    )
    draft_keep: float | None = _setting(
        None,
        "Share of each layer's neurons that a resident draft computes, at most --keep: pays where drafts, not the link, take the "
        "time. Default: all that are resident.",
    )
    overlap: bool = _setting(
        True, "Let the link fetch for the coming correction while a resident draft computes; off to see what that is worth."
    )
    tree_width: int = _setting(1, "Branches that are drafted side by side and verified together.")
    lookup: bool | None = _setting(
        None,
        "Have corrections also verify what followed the last tokens when they stood in prompt or answer before, where that pays; "
        "it takes no draft step and moves no bytes. Default: with --accept exact; a threshold takes the longest likely path, so "
        "that more paths change the answer.",
    )

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "mode", self.mode, "one of " + ", ".join(MODES))
        _require(self.sparsity in SPARSITIES, "sparsity", self.sparsity, "one of " + ", ".join(SPARSITIES))
        _require(0 < self.keep <= 1, "keep", self.keep, "above 0 and at most 1")
        object.__setattr__(self, "cats_threshold", _cats_threshold(self.cats_threshold))
        if self.cats_threshold is not None:
            both = f"{self.cats_threshold} with --sparsity {self.sparsity}"
            _require(self.sparsity == "cats", "cats-threshold", both, "left out, or given with --sparsity cats")
        object.__setattr__(self, "window", _window(self.window))
        _require(self.accept in ACCEPTS, "accept", self.accept, "one of " + ", ".join(ACCEPTS))
        _require(0 < self.threshold <= 1, "threshold", self.threshold, "above 0 and at most 1")
        _require(self.draft in DRAFTS, "draft", self.draft, "one of " + ", ".join(DRAFTS))
        firsts = "one of " + ", ".join(RESIDENT_FIRSTS)
        _require(self.resident_first in RESIDENT_FIRSTS, "resident-first", self.resident_first, firsts)
        _require(0 <= self.refresh_decay < 1, "refresh-decay", self.refresh_decay, "at least 0 and below 1")
        if self.draft == "resident" and self.sparsity != "griffin":
            raise ConfigError(
                f"--draft resident keeps neurons for a whole answer, and --sparsity is {self.sparsity}; use griffin"
            )
        _require(
            self.draft_quantize in DRAFT_QUANTIZES, "draft-quantize", self.draft_quantize, "one of " + ", ".join(DRAFT_QUANTIZES)
        )
        if self.draft_quantize != "none":
            _require(
                self.draft != "streamed" and self.sparsity == "griffin",
                "draft-quantize",
                f"{self.draft_quantize} with --draft {self.draft} and --sparsity {self.sparsity}",
                "none, or with --draft resident and --sparsity griffin",
            )
            _require(self.draft_keep is None, "draft-keep", self.draft_keep, "left out with --draft-quantize")
        if self.draft_keep is not None:
            _require(0 < self.draft_keep <= self.keep, "draft-keep", self.draft_keep, f"above 0 and at most --keep {self.keep:g}")
            _require(self.keep < 1, "keep", self.keep, "below 1 with --draft-keep")
            _require(
                self.draft != "streamed" and self.sparsity == "griffin",
                "draft-keep",
                f"{self.draft_keep:g} with --draft {self.draft} and --sparsity {self.sparsity}",
                "left out, or with --draft resident",
            )
        _require(self.tree_width >= 1, "tree-width", self.tree_width, "at least 1")
        _require(
            tree_nodes(MIN_WINDOW, self.tree_width) <= MAX_TREE_NODES,
            "tree-width",
            self.tree_width,
            f"at most {MAX_TREE_NODES - 1}",
        )
        if isinstance(self.window, int):
            nodes = tree_nodes(self.window, self.tree_width)
            given = self.window if self.tree_width == 1 else f"{self.window} with --tree-width {self.tree_width}"
            _require(nodes <= MAX_TREE_NODES, "window", given, f"such that (window - 1) * width + 1 is at most {MAX_TREE_NODES}")

    @property
    def drafts(self) -> bool:
        """Whether there are sparse steps."""
        return self.mode != "full"

    @property
    def draft_format(self) -> WeightFormat | None:
        """Of the copy that drafts compute on; None: there is none, or prediction decides whether there is."""
        if not self.drafts or self.draft_quantize == "none" or self.draft_quantize == "auto":
            return None
        return WeightFormat(kind=self.draft_quantize, group=DRAFT_GROUPS[self.draft_quantize])

    @property
    def max_window(self) -> int:
        """The longest window there may be."""
        if isinstance(self.window, int):
            return self.window
        if self.tree_width == 1:
            return MAX_AUTO_WINDOW
        return max(MIN_WINDOW, min(MAX_AUTO_WINDOW, 1 + (MAX_TREE_NODES // 2 - 1) // self.tree_width))

    @property
    def max_drafted_nodes(self) -> int:
        """Most tokens of one pass behind the prompt that are drafted, with the one that they follow."""
        return tree_nodes(self.max_window, self.tree_width) if self.mode == "sirius" else 1

    @property
    def num_lookup_nodes(self) -> int:
        """Most tokens beside those that are looked up."""
        looks_up = self.accept == "exact" if self.lookup is None else self.lookup
        if self.mode != "sirius" or not looks_up:
            return 0
        return min(MAX_LOOKUP_NODES, MAX_TREE_NODES - self.max_drafted_nodes)

    @property
    def max_nodes(self) -> int:
        """Most tokens of one pass behind the prompt."""
        return self.max_drafted_nodes + self.num_lookup_nodes

    @property
    def num_side_nodes(self) -> int:
        """Tokens of a window beside the longest branch: positions of the KV cache that are taken and given back."""
        return self.max_nodes - self.max_window if self.mode == "sirius" else 0

    @property
    def with_prior(self) -> bool:
        """Whether earlier runs have a say in which neurons a resident draft keeps."""
        if self.prior is None:
            return self.mode == "sirius" and self.accept == "exact"
        return self.prior and self.drafts

    def num_kept(self, num_neurons: int) -> int:
        """N: neurons that a draft step keeps of that many."""
        return max(1, int(num_neurons * self.keep))

    def num_drafted(self, num_neurons: int, num_hot: int) -> int:
        """M: neurons of that many that a draft step computes where num_hot of them are resident."""
        return num_hot if self.draft_keep is None else min(num_hot, max(1, int(num_neurons * self.draft_keep)))

    def drafting_from(self, draft: Draft) -> DecodingConfig:
        """The same with drafts there, and without what is of resident ones only."""
        if draft == "streamed":
            return replace(self, draft=draft, draft_keep=None, draft_quantize="none")
        return replace(self, draft=draft)


def tree_nodes(window: int, tree_width: int) -> int:
    """Tokens of a window: a root, and a level of the tree for each further token of it."""
    return (window - 1) * tree_width + 1


def _window(found: int | str) -> int | str:
    text = str(found)
    if text == AUTO:
        return AUTO
    _require(text.isdecimal() and int(text) >= MIN_WINDOW, "window", text, f"{AUTO}, or {MIN_WINDOW} or more tokens")
    return int(text)


def _cats_threshold(found: str | float | None) -> str | float | None:
    if found is None or found == AUTO:
        return found
    try:
        number = float(found)
    except ValueError:
        number = -1.0
    _require(math.isfinite(number) and number > 0, "cats-threshold", found, f"{AUTO} or a positive number")
    return number


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What to run and where: decides the plan. Sizes are given as text, `24GiB` or a share such as `0.8`."""

    model: str = _setting(
        DEFAULT_MODEL, "Alias, hub id, directory, .safetensors or .gguf file, or synthetic:SHAPE (random weights, for timing)."
    )
    device: str = _setting("auto", "auto, cuda, cuda:N or cpu.")
    device_memory: str = _setting("0.9", "Device memory to use: 24GiB, 500MB, or a share of what is free.")
    host_memory: str = _setting(
        "0.8", "Host memory for weights: 64GiB, 500MB, or a share of what is free. The rest stays on disk."
    )
    link_gbps: float | None = _setting(None, "Emulate a host-to-device link of this many GB/s (1e9 bytes) by pacing real copies.")
    dtype: Dtype = _setting("auto", "auto (float32 for float32 checkpoints, else bfloat16), bfloat16 or float32.")
    quantize: Quantize = _setting(
        "none",
        "Hold the layers' matrices in 8 or 4 bits, quantised while loading, without calibration: int8, int4 or none.",
    )
    quantize_group: int | None = _setting(
        None,
        "Weights that share a scale: "
        + ", ".join(map(str, GROUPS))
        + ". Fewer are more exact, and take more bytes. Default: "
        + ", ".join(f"{group} for {kind}" for kind, group in DEFAULT_GROUPS.items())
        + ".",
    )
    quantize_head: QuantizeHead = _setting(
        "none",
        "Hold the head, which makes the logits, in 8 bits: int8 or none. The embedding stays as it is, also where both are one.",
    )
    keep_blocks: bool = _setting(
        True, "Hold the matrices of a GGUF file as the blocks they are stored in; else they are dequantised. Without --quantize."
    )
    max_context: int | None = _setting(None, "Positions to plan the KV cache for. Default: prompt and answer, 4096 in Python.")
    kv_dtype: KVDtype = _setting(
        "auto",
        "auto: keys and values are held in the type that is computed in. int8: in 8 bits, each row of a head with a scale of its "
        "own; half the bytes of bfloat16, nearly the same text.",
    )
    parallel: int = _setting(
        1, "Answers that may be written together: each has a KV cache of its own, and all share every pass of the weights."
    )
    auto: bool = _setting(False, "Choose by predicted speed what is left to choose: bfloat16 or float32, where --dtype is auto.")
    threads: int | None = _setting(
        None, "CPU threads to compute with. Default: the physical cores, less one while layers come from disk."
    )
    cuda_graphs: bool = _setting(
        True, "Launch the kernels of a resident draft step together, as a CUDA graph. Has no effect on a CPU, nor on trees."
    )
    shared_host_buffers: int | None = _setting(
        None, "Let all streamed layers share this many host buffers: timing of synthetic shapes that exceed host memory."
    )
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """What there must be memory for; answers may differ in what takes no more."""

    def __post_init__(self) -> None:
        for name in ("model", "device", "device_memory", "host_memory"):
            found = getattr(self, name)
            _require(isinstance(found, str), name.replace("_", "-"), repr(found), "text, such as '20GiB' for a size")
        parts = self.device.split(":")
        known = parts[0] in ("auto", "cuda", "cpu") and (len(parts) == 1 or (parts[0] == "cuda" and parts[1].isdecimal()))
        _require(known and len(parts) <= 2, "device", self.device, "auto, cuda, cuda:N or cpu")
        _require(self.dtype in DTYPES, "dtype", self.dtype, "one of " + ", ".join(DTYPES))
        _require(self.kv_dtype in KV_DTYPES, "kv-dtype", self.kv_dtype, "one of " + ", ".join(KV_DTYPES))
        _require(self.quantize in QUANTIZES, "quantize", self.quantize, "one of " + ", ".join(QUANTIZES))
        heads = "one of " + ", ".join(QUANTIZE_HEADS)
        _require(self.quantize_head in QUANTIZE_HEADS, "quantize-head", self.quantize_head, heads)
        if self.quantize_group is not None:
            _require(self.quantize != "none", "quantize-group", self.quantize_group, "left out without --quantize")
            _require(
                self.quantize_group in GROUPS, "quantize-group", self.quantize_group, "one of " + ", ".join(map(str, GROUPS))
            )
        draft_format, own = self.decoding.draft_format, self.weight_format
        if draft_format is not None and own is not None and draft_format.bits >= own.bits:
            raise ConfigError(
                f"--draft-quantize is {draft_format.kind}, and --quantize is {own.kind}; a copy for drafts must have fewer bits, "
                "or --draft-quantize be none"
            )
        _require(bool(self.model.strip()), "model", repr(self.model), "an alias, hub id, path or synthetic:SHAPE")
        if self.link_gbps is not None:
            _require(1e-6 <= self.link_gbps <= 1e6, "link-gbps", self.link_gbps, "between 0.000001 and 1,000,000 GB/s")
        if self.max_context is not None:
            _require(self.max_context >= 1, "max-context", self.max_context, "at least 1")
        _require(1 <= self.parallel <= MAX_PARALLEL, "parallel", self.parallel, f"between 1 and {MAX_PARALLEL}")
        if self.threads is not None:
            _require(1 <= self.threads <= 1024, "threads", self.threads, "between 1 and 1024")
        if self.shared_host_buffers is not None:
            _require(self.shared_host_buffers >= 1, "shared-host-buffers", self.shared_host_buffers, "at least 1")
            _require(self.model.startswith("synthetic:"), "model", self.model, "synthetic:SHAPE with --shared-host-buffers")
        self.device_size, self.host_size  # noqa: B018  raises where a size cannot be read

    @property
    def step_rows(self) -> int:
        """Most tokens of one pass behind the prompts, of all answers together."""
        return max(self.parallel, min(self.parallel * self.decoding.max_nodes, max(self.decoding.max_nodes, MAX_TREE_NODES)))

    @property
    def weight_format(self) -> WeightFormat | None:
        """How matrices are held; None: in the type they are computed in."""
        if self.quantize == "none":
            return None
        return WeightFormat(kind=self.quantize, group=self.quantize_group or DEFAULT_GROUPS[self.quantize])

    @property
    def head_format(self) -> WeightFormat | None:
        """The same of the head."""
        if self.quantize_head == "none":
            return None
        return WeightFormat(kind=self.quantize_head, group=DEFAULT_GROUPS[self.quantize_head])

    @property
    def device_size(self) -> Size:
        """The device budget as given."""
        return parse_size(self.device_memory)

    @property
    def host_size(self) -> Size:
        """The host budget as given."""
        return parse_size(self.host_memory)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a prediction is asked for beside a model and its place, and rates of machines one does not have."""

    device_tflops: float | None = _setting(
        None, "Describe a device with memory of its own: TFLOPS (1e12) of its matmuls in this dtype."
    )
    device_gbps: float | None = _setting(
        None, "Describe a device with memory of its own: GB/s (1e9 bytes) at which it reads its memory."
    )
    disk_gbps: float | None = _setting(
        None, "Rate of the disk in GB/s (1e9 bytes). Default: measured by doctor --measure, or assumed."
    )
    prompt_tokens: int = _setting(512, "Tokens of the prompt.")

    def __post_init__(self) -> None:
        for name in ("device_tflops", "device_gbps", "disk_gbps"):
            found = getattr(self, name)
            if found is not None:
                _require(1e-6 <= found <= 1e6, name.replace("_", "-"), found, "between 0.000001 and 1,000,000")
        _require(1 <= self.prompt_tokens <= 10**7, "prompt-tokens", self.prompt_tokens, "between 1 and 10,000,000")

    @property
    def describes_device(self) -> bool:
        """The device is one that need not be here."""
        return self.device_tflops is not None or self.device_gbps is not None


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. The order of the steps is that of Hugging Face: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = _setting(0.0, "Divides the logits; 0 is greedy.")
    top_k: int = _setting(0, "Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = _setting(1.0, "Keep the likeliest tokens whose probabilities reach p together; 1 keeps all.")
    min_p: float = _setting(0.0, "Drop tokens less likely than this share of the likeliest one; 0 drops none.")
    repetition_penalty: float = _setting(1.0, "Weakens tokens that already stand in prompt or answer; 1 is none.")
    seed: int = _setting(0, "The draw at a position depends on the seed and the position, on nothing else.")

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or a positive number"
        )
        _require(self.top_k >= 0, "top-k", self.top_k, "0 or a positive number of tokens")
        _require(0 < self.top_p <= 1, "top-p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min-p", self.min_p, "between 0 and 1")
        _require(
            0.001 <= self.repetition_penalty <= 1000, "repetition-penalty", self.repetition_penalty, "between 0.001 and 1000"
        )
        _require(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2^64 - 1")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """One request: how it is decoded and when it ends."""

    decoding: DecodingConfig | None = None
    """None: as the model was loaded for."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = _setting(256, "Longest answer, in tokens.")
    stop: tuple[str, ...] = _setting((), "Text that ends the answer and is not part of it; may be given several times.")
    ignore_eos: bool = _setting(False, "Go on past the model's end tokens (for timing).")
    chat: bool = _setting(True, "Apply the model's chat template, where it has one.")
    reuse: bool = _setting(
        True,
        "Take keys and values of the prompt's beginning from earlier answers, where it is the same and the full model decides "
        "every token: modes full, and sirius with exact acceptance.",
    )

    logprobs: int | None = _setting(
        None, "Give each token's log-probability by the full model, before temperature, and that of so many of the likeliest."
    )

    def __post_init__(self) -> None:
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"between 0 and {MAX_LOGPROBS}")
        _require(1 <= self.max_new_tokens <= 10**7, "max-new-tokens", self.max_new_tokens, "between 1 and 10,000,000")
        _require(all(self.stop), "stop", repr(""), "a text that is not empty")
        if self.decoding is not None:
            require_greedy_threshold(self.decoding, self.sampling)


def require_greedy_threshold(decoding: DecodingConfig, sampling: SamplingConfig) -> None:
    """Raises ConfigError where drafted tokens would be taken by a threshold, and all others drawn."""
    if decoding.mode == "sirius" and decoding.accept == "threshold" and sampling.temperature > 0:
        raise ConfigError(
            f"--accept threshold is greedy, and --temperature is {sampling.temperature}; "
            "use --temperature 0, or --accept exact, which samples"
        )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the server meets its clients."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = _setting(8080, "Port to listen on; 0 takes a free one.")
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "What clients must send as bearer token. Default: OFFLOAD_SIRIUS_API_KEY, where it is set, else none."},
    )
    served_name: tuple[str, ...] = _setting(
        (), "Name of the model in requests; may be given several times, the first is listed. Default: its alias or own name."
    )
    max_queue: int = _setting(64, "Requests that may wait for their turn; one more is told to come again (429).")
    max_request_size: str = _setting("4MiB", "Largest body of a request; a larger one is refused while it is read (413).")
    grace: float = _setting(30.0, "Seconds in which a stopping server finishes the answers that are being written.")

    def __post_init__(self) -> None:
        _require(bool(self.host.strip()), "host", repr(self.host), "an address such as 127.0.0.1")
        _require(0 <= self.port <= 65535, "port", self.port, "between 0 and 65535")
        if self.api_key is not None:
            _require(self.api_key.isascii() and self.api_key.strip() == self.api_key != "", "api-key", "not usable", "ASCII text")
        _require(all(name.strip() for name in self.served_name), "served-name", repr(""), "a name that is not empty")
        _require(0 <= self.max_queue <= 10**6, "max-queue", self.max_queue, "between 0 and 1,000,000")
        nbytes = parse_size(self.max_request_size).nbytes
        _require(nbytes is not None, "max-request-size", self.max_request_size, "a number of bytes such as 4MiB")
        _require(math.isfinite(self.grace) and self.grace >= 0, "grace", self.grace, "0 or more seconds")

    @property
    def max_request_nbytes(self) -> int:
        """The largest body in bytes."""
        nbytes = parse_size(self.max_request_size).nbytes
        assert nbytes is not None
        return nbytes
