"""The report page is one file without other dependencies, for a run in any state."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from trainer import charts, report
from trainer.report import read_run, render, write_report
from trainer.report_words import MEANINGS, UNKNOWN, meaning
from utils.video.write import VideoWriter

VOID = {"meta", "br", "img", "link", "input", "line", "path"}


class Checker(HTMLParser):
    """Collects text and addresses, and checks that tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.addresses, self.words, self.counts = [], [], [], {}
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def logdir(tmp_path):
    """Give a run that was killed in step 41 of 60. One of its steps was repeated, and it has two sets of samples."""
    folder = tmp_path / "a run & <more>"
    folder.mkdir()
    steps = [*range(1, 31), *range(25, 41)]
    lines = [
        {
            "step": step,
            "generator_loss": None if step == 7 else 1000.0 / step**2,
            "seconds": 2.0,
            "seconds_rollout": 1.0,
            "seconds_scores": 0.5,
            "memory_gib": 3.25,
        }
        for step in steps
    ]
    lines[-16]["generator_loss"] = 7.0  # step 25, done again
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "gener')
    prompts = folder / "prompts.txt"
    prompts.write_text("a <red> circle\na blue square\n")
    (folder / "config.yaml").write_text(
        "objective: self_forcing_dmd\ntrainer: {steps: 60, batch_size: 4}\n"
        f"video: {{fps: 12}}\ndata: {{sample_prompts: '{prompts}'}}\n"
    )
    for step in (20, 40):
        for index in range(2):
            with VideoWriter(folder / "samples" / f"step_{step:06d}" / f"{index:02d}.mp4", 12) as writer:
                writer.write(torch.rand(4, 3, 32, 48) * 2 - 1)
    return folder


def test_the_page_shows_the_run_and_asks_for_nothing_outside_itself(logdir):
    page = write_report(logdir).read_text(encoding="utf-8")
    checked = Checker(page)
    assert all(address.startswith("data:image/webp;base64,") for address in checked.addresses)
    assert checked.counts["img"] == 4 and not re.search(r"https?://|url\(|@import", page)
    for shown in ("a run & <more>", "40 of 60", "a <red> circle", "step 20", "step 40", "3.25 GiB", "generator loss"):
        assert shown in checked.text
    assert "0.5" in checked.text and "rollout" in checked.text and "50%" in checked.text and "other" in checked.text
    assert checked.counts["svg"] == 1  # generator loss; seconds and memory never changed
    assert "2 curves never changed" in checked.text and "a leak" in checked.text and "judge the samples" in checked.text
    assert 'class="lost"' in page and "values not finite" in checked.text


def test_of_a_step_done_twice_the_last_line_counts_and_a_torn_line_does_not(logdir):
    curves = read_run(logdir).curves
    loss = dict(curves["generator_loss"])
    assert list(loss) == list(range(1, 41)) and loss[25] == 7.0 and loss[7] is None
    (logdir / "metrics.jsonl").write_text('[]\nnonsense\n{"no": 1}\n{"step": 2, "a": 1.5}\n')
    assert read_run(logdir).curves == {"a": [(2, 1.5)]}


@pytest.mark.parametrize("text", ["a: [1", "- a", "just text", "\x00", "a: !!python/object/apply:os.getcwd []"])
def test_a_damaged_configuration_costs_the_report_nothing_else(logdir, text, caplog):
    (logdir / "config.yaml").write_text(text)
    assert read_run(logdir).config == {} and caplog.text.count("config.yaml: is damaged") == 1
    assert "generator loss" in write_report(logdir).read_text()


def test_the_csv_holds_every_number(logdir):
    write_report(logdir)
    with open(logdir / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and float(rows[24]["generator_loss"]) == 7.0 and rows[6]["generator_loss"] == ""
    assert next(iter(rows[0])) == "step" and {row["seconds"] for row in rows} == {"2.0"}


def test_missing_pieces_are_left_out(tmp_path):
    empty = render(read_run(tmp_path))
    assert "No metrics yet" in Checker(empty).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "other": null}\n')
    (tmp_path / "samples" / "step_000001").mkdir(parents=True)
    (tmp_path / "samples" / "step_000001" / "00.mp4").write_bytes(b"no video")
    checked = Checker(render(read_run(tmp_path)))
    assert "never finite" in checked.text and checked.addresses == ["data:,"]


def test_curves_that_hardly_move_or_span_decades_have_round_ticks_inside_the_chart():
    for values in ([1.0] * 3, [0.0] * 3, [1e-6, 1.0, 1e4], [-3.0, 5.0, 0.1], [2e-4, 1.9e-4, 1.8e-4]):
        svg = charts.chart("x", list(enumerate(values, start=1)))
        places = [float(y) for y in re.findall(r'<line x1="[\d.]+" x2="[\d.]+" y1="([-\d.]+)"', svg)]
        assert places and all(0 <= y <= charts.HEIGHT for y in places)
        drawn = re.search(r'class="raw" d="M([^"]*)"', svg)[1].split("L")
        assert all(0 <= float(y) <= charts.HEIGHT for _, y in (point.split() for point in drawn))


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith("nowhere: no such log folder\n")


def test_every_metric_of_a_training_has_its_sentence():
    """Those with a part's name in front have that of the part; names from elsewhere point to the documentation."""
    names = {"generator_loss", "critic_gradient_norm", "gradient_norm", "critic_lr", "skipped", "samples_per_second"}
    told = {name: meaning(name) for name in names}
    assert len(set(told.values())) == len(names) and UNKNOWN not in told.values()
    assert meaning("teacher_lr") == meaning("lr")
    assert meaning("something") == UNKNOWN
    assert all(text.count(".") >= 1 and text.endswith(".") for text in MEANINGS.values())
