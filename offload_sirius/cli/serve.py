"""`offload-sirius serve`: a model behind OpenAI's API, and a page to talk to it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from offload_sirius.cli import flags
from offload_sirius.config import DecodingConfig, EngineConfig, ServeConfig, help_of
from offload_sirius.errors import ConfigError

EXAMPLES = """\b
Examples:
  offload-sirius serve --model llama-3-8b --device-memory 6GiB
  offload-sirius serve --host 0.0.0.0 --port 8000 --api-key SECRET --max-queue 200
"""

SERVER = "Server"

_ENGINE = EngineConfig()
_DECODING = DecodingConfig()
_SERVE = ServeConfig()


def _option(name: str, metavar: str, **more: Any) -> Any:
    flag = "--" + name.replace("_", "-")
    return typer.Option(flag, help=help_of(ServeConfig, name), metavar=metavar, rich_help_panel=SERVER, **more)


def serve(
    host: Annotated[str, _option("host", "ADDRESS")] = _SERVE.host,
    port: Annotated[int, _option("port", "N")] = _SERVE.port,
    api_key: Annotated[str | None, _option("api_key", "KEY", envvar="OFFLOAD_SIRIUS_API_KEY", show_envvar=False)] = None,
    served_name: Annotated[list[str] | None, _option("served_name", "NAME")] = None,
    max_queue: Annotated[int, _option("max_queue", "N")] = _SERVE.max_queue,
    max_request_size: Annotated[str, _option("max_request_size", "SIZE")] = _SERVE.max_request_size,
    grace: Annotated[float, _option("grace", "SECONDS")] = _SERVE.grace,
    model: flags.Model = _ENGINE.model,
    mode: flags.Mode = _DECODING.mode,
    sparsity: flags.Sparsity = _DECODING.sparsity,
    keep: flags.Keep = _DECODING.keep,
    cats_threshold: flags.CatsThreshold = None,
    window: flags.Window = str(_DECODING.window),
    accept: flags.Accept = _DECODING.accept,
    threshold: flags.Threshold = _DECODING.threshold,
    draft: flags.Draft = _DECODING.draft,
    draft_quantize: flags.DraftQuantize = _DECODING.draft_quantize,
    resident_first: flags.ResidentFirst = _DECODING.resident_first,
    refresh: flags.Refresh = _DECODING.refresh,
    refresh_decay: flags.RefreshDecay = _DECODING.refresh_decay,
    overlap: flags.Overlap = _DECODING.overlap,
    prior: flags.Prior = _DECODING.prior,
    draft_keep: flags.DraftKeep = _DECODING.draft_keep,
    tree_width: flags.TreeWidth = _DECODING.tree_width,
    lookup: flags.Lookup = None,
    device: flags.Device = _ENGINE.device,
    device_memory: flags.DeviceMemory = _ENGINE.device_memory,
    host_memory: flags.HostMemory = _ENGINE.host_memory,
    link_gbps: flags.LinkGbps = _ENGINE.link_gbps,
    dtype: flags.Dtype = _ENGINE.dtype,
    quantize: flags.Quantize = _ENGINE.quantize,
    quantize_group: flags.QuantizeGroup = _ENGINE.quantize_group,
    quantize_head: flags.QuantizeHead = _ENGINE.quantize_head,
    keep_blocks: flags.KeepBlocks = _ENGINE.keep_blocks,
    max_context: flags.MaxContext = _ENGINE.max_context,
    kv_dtype: flags.KvDtype = _ENGINE.kv_dtype,
    parallel: flags.Parallel = _ENGINE.parallel,
    auto: flags.Auto = _ENGINE.auto,
    threads: flags.Threads = _ENGINE.threads,
    cuda_graphs: flags.CudaGraphs = _ENGINE.cuda_graphs,
    shared_host_buffers: flags.SharedHostBuffers = _ENGINE.shared_host_buffers,
    verbose: flags.Verbose = False,
) -> int:
    """Answer requests in the words of OpenAI's API: /v1/chat/completions, /v1/completions; and a page to chat, at /."""
    serving = ServeConfig(
        host=host,
        port=port,
        api_key=api_key,
        served_name=tuple(served_name or ()),
        max_queue=max_queue,
        max_request_size=max_request_size,
        grace=grace,
    )
    decoding = DecodingConfig(
        mode=mode,  # type: ignore[arg-type]  # checked by DecodingConfig, as are the next
        sparsity=sparsity,  # type: ignore[arg-type]
        keep=keep,
        cats_threshold=cats_threshold,
        window=window,
        accept=accept,  # type: ignore[arg-type]
        threshold=threshold,
        draft=draft,  # type: ignore[arg-type]
        draft_quantize=draft_quantize,  # type: ignore[arg-type]
        resident_first=resident_first,  # type: ignore[arg-type]
        refresh=refresh,
        refresh_decay=refresh_decay,
        overlap=overlap,
        prior=prior,
        draft_keep=draft_keep,
        tree_width=tree_width,
        lookup=lookup,
    )
    engine_config = EngineConfig(
        model=model,
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        link_gbps=link_gbps,
        dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
        quantize=quantize,  # type: ignore[arg-type]
        quantize_group=quantize_group,
        quantize_head=quantize_head,  # type: ignore[arg-type]
        keep_blocks=keep_blocks,
        max_context=max_context,
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        parallel=parallel,
        auto=auto,
        threads=threads,
        cuda_graphs=cuda_graphs,
        shared_host_buffers=shared_host_buffers,
        decoding=decoding,
    )
    return _run(engine_config, serving, verbose=verbose)


def _run(engine_config: EngineConfig, serving: ServeConfig, *, verbose: bool) -> int:
    try:
        from offload_sirius.serve.server import bind, names_of_model
        from offload_sirius.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'offload-sirius[serve]'") from error

    from offload_sirius.cli.console import LoadProgress, say
    from offload_sirius.cli.generate import explain
    from offload_sirius.engine import build, open_model
    from offload_sirius.serve.worker import Loaded

    # What can be known before anything is loaded: that the port is free, and that the model is there.
    listener = bind(serving)
    model = open_model(engine_config.model)
    names = names_of_model(engine_config.model, model.spec.name, serving.served_name)
    where = _address(listener.getsockname())
    say(f"{where}: loading {names[0]}")
    progress = LoadProgress()

    def load() -> Loaded:
        engine = build(model, engine_config, progress)
        if engine.rates_problem:
            say(engine.rates_problem)
        if verbose:
            explain(engine, 1)
        return engine, engine.batch()

    def on_ready() -> None:
        say(f"{where}: {names[0]} is ready; a page to chat is there, and OpenAI's API at {where}/v1")

    return run(listener, load, serving, names, on_ready=on_ready, on_abort=progress.end)


def _address(name: tuple[Any, ...]) -> str:
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
