"""Measuring models by lm-evaluation-harness: `python -m offload_sirius.eval` is `lm_eval` that knows `--model offload-sirius`."""
