"""lm-evaluation-harness with `--model offload-sirius`: the harness finds no models by itself that are not its own.

python -m offload_sirius.eval --model offload-sirius --model_args model=llama-3-8b,device_memory=6GiB --tasks arc_easy
"""

from __future__ import annotations

import sys

from offload_sirius.errors import USER_ERRORS


def main() -> int:
    """Run the harness's own command line. Returns the exit code."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; install it with pip install 'offload-sirius[eval]'")
    import offload_sirius.eval.adapter  # noqa: F401  registers the model

    try:
        cli_evaluate()
    except USER_ERRORS as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    sys.exit(main())
