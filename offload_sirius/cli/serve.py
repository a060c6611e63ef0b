"""`offload-sirius serve`: a model behind OpenAI's API, and a page to talk to it."""

from __future__ import annotations

from typing import Annotated, Any

from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import FlagGroup, Form, with_flag_groups
from offload_sirius.config import EngineConfig, ServeConfig
from offload_sirius.errors import ConfigError

EXAMPLES = """\b
Examples:
  offload-sirius serve --model llama-3-8b --device-memory 6GiB
  offload-sirius serve --host 0.0.0.0 --port 8000 --api-key SECRET --max-queue 200
"""

SERVER = "Server"

SERVING = FlagGroup.of(
    ServeConfig,
    SERVER,
    host=Form(str, "ADDRESS"),
    port=Form(int, "N"),
    api_key=Form(str | None, "KEY", "OFFLOAD_SIRIUS_API_KEY"),
    served_name=Form(list[str] | None, "NAME"),
    max_queue=Form(int, "N"),
    max_request_size=Form(str, "SIZE"),
    grace=Form(float, "SECONDS"),
)


@with_flag_groups
def serve(
    *,
    serving: Annotated[ServeConfig, SERVING],
    engine_config: Annotated[EngineConfig, settings.ENGINE],
    verbose: flags.Verbose = False,
) -> int:
    """Answer requests in the words of OpenAI's API: /v1/chat/completions, /v1/completions; and a page to chat, at /."""
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
