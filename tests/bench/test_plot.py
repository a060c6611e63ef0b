"""Pictures: drawn where matplotlib is, refused in one line where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from offload_sirius.bench import plot
from offload_sirius.bench.answers import DecodeRow
from offload_sirius.bench.decode import DecodeReport
from offload_sirius.bench.gather import GatherRate
from offload_sirius.bench.link import CopyRate, DepthRate, DiskRates, LinkReport
from offload_sirius.bench.plot import plot_decode, plot_link, plot_stream, require_plot
from offload_sirius.bench.spread import Spread
from offload_sirius.bench.stream import Ceiling, LayerGap, StreamReport
from offload_sirius.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"
RATE = Spread(median=2e9, lowest=1e9, highest=3e9)
LINK = LinkReport(
    device="cpu",
    copies=tuple(CopyRate(way=way, nbytes=nbytes, bytes_per_second=RATE) for way in ("one", "two") for nbytes in (1024, 4096)),
    disk=DiskRates(path="/data", direct=True, rates=(DepthRate(depth=1, read_nbytes=4096, bytes_per_second=RATE),)),
    gathers=(GatherRate(way="runs", run_length=1, kept_nbytes=64, bytes_per_second=RATE),),
)
STREAM = StreamReport(
    model="synthetic:tiny",
    device="cpu",
    num_slots=2,
    pinned_nbytes=0,
    pageable_nbytes=1000,
    pass_nbytes=1000,
    seconds=Spread(median=2.0, lowest=1.0, highest=3.0),
    all_seconds=(1.0, 2.0, 3.0),
    ceilings=(Ceiling(what="the emulated link's rate", bytes_per_second=1000.0, nbytes=1000),),
    copy_busy_share=0.5,
    layers=(LayerGap(layer=0, tier="host", seconds=0.5), LayerGap(layer=1, tier="resident", seconds=0.0)),
)
FULL = DecodeRow(
    name="full",
    mode="full",
    sparsity=None,
    keep=None,
    window=None,
    accept=None,
    threshold=None,
    tree_width=None,
    seconds_per_token=RATE,
    ratio=1.0,
    aal=None,
    acceptance=None,
    effective_density=1.0,
    nbytes_per_token=1000.0,
    agreement=1.0,
    num_identical=2,
    busy_share=0.9,
    cache_hit_share=None,
    draft_seconds=None,
    draft_nbytes=None,
    draft_link_ratio=None,
    correction_seconds=None,
    correction_ratio=None,
    num_streamed_layers=4,
    num_resident_layers=0,
)
CATS = replace(FULL, name="cats", mode="sirius", sparsity="cats", keep=0.5, ratio=0.7, aal=3.5, effective_density=0.9)
UNTIMED = replace(CATS, name="one token", ratio=None, aal=None, effective_density=None)
DECODE = DecodeReport(
    model="synthetic:tiny",
    device="cpu",
    dtype="float32",
    device_budget_nbytes=1000,
    host_budget_nbytes=1000,
    link_gbps=1.0,
    pass_nbytes=1000,
    num_prompts=2,
    prompt_tokens=(3, 4),
    max_new_tokens=8,
    forced_aal=None,
    rows=(FULL, CATS, UNTIMED),
)


def test_all_reports_are_drawn_as_png(tmp_path: Path) -> None:
    plot_link(LINK, tmp_path / "link.png")
    plot_stream(STREAM, tmp_path / "stream.png")
    plot_decode(DECODE, tmp_path / "decode.png")
    images = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert [image[: len(PNG)] for image in images] == [PNG] * 3
    assert len(set(images)) == 3


def test_a_picture_that_can_be_drawn_is_not_refused_and_nothing_is_written(tmp_path: Path) -> None:
    require_plot(tmp_path / "link.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        require_plot(tmp_path / "link.png")
    assert str(caught.value) == "--plot needs matplotlib, which is not installed; pip install 'offload-sirius[plot]'"


def test_the_stream_report_derives_its_share_from_the_slowest_link() -> None:
    slow = Ceiling(what="plain reads of the files", bytes_per_second=100.0, nbytes=150)
    report = StreamReport(**vars(STREAM) | {"ceilings": (*STREAM.ceilings, slow)})
    assert (report.bound, report.link_share, report.gap_seconds) == (slow, 0.75, 0.5)
