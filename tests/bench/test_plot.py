"""Pictures: drawn where matplotlib is, refused in one line where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_sirius.bench import plot
from offload_sirius.bench.gather import GatherRate
from offload_sirius.bench.link import CopyRate, DepthRate, DiskRates, LinkReport
from offload_sirius.bench.plot import plot_link, plot_stream, require_plot
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


def test_both_reports_are_drawn_as_png(tmp_path: Path) -> None:
    plot_link(LINK, tmp_path / "link.png")
    plot_stream(STREAM, tmp_path / "stream.png")
    images = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert [image[: len(PNG)] for image in images] == [PNG, PNG]
    assert images[0] != images[1]


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
