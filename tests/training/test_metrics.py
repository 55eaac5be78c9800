"""What a run writes beside its checkpoints, where nothing can be written, and when it goes on."""

from __future__ import annotations

import struct

import pytest
import tensorboardX.record_writer
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event, SessionLog

from kimi_jax.errors import UserError
from kimi_jax.training import metrics
from kimi_jax.training.board import Board


def events(folder) -> list[Event]:
    """Of the records of a TFRecord file: length, its checksum, data, its checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard_keeps_what_was_written_up_to_the_step_that_a_run_goes_on_from(tmp_path):
    """TensorBoard hides what earlier files hold from the step of a START on."""
    board = Board(tmp_path, 150)
    board.add(160, {"train/loss": 2.5, "train/learning_rate": 0.5})
    board.close()
    version, start, record = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 151)
    assert record.step == 160
    assert {v.tag: v.simple_value for v in record.summary.value} == {"train/loss": 2.5, "train/learning_rate": 0.5}


def test_a_full_disk_ends_the_run_with_one_line(tmp_path, monkeypatch):
    record = dict.fromkeys(("loss", "bits_per_byte", "learning_rate", "max_logit", "tokens_per_second"), 1.0)
    (tmp_path / metrics.FILE).symlink_to("/dev/full")
    writer = metrics.Writer(tmp_path, 9, 0, 1)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: No space left on device"):
        writer.train({"step": 1, **record})
    with pytest.raises(UserError, match="No space left"):
        writer.close()

    (tmp_path / metrics.FILE).unlink()
    monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda _: open("/dev/full", "wb"))
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: No space left on device"):
        metrics.Writer(tmp_path, 9, 0, 1)


def test_curves_appear_when_they_are_whole(tmp_path, monkeypatch):
    """Whoever starts a run again takes them for the sign that it has ended."""

    def cut_short(figure, path, **how):
        path.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", cut_short)
    with pytest.raises(UserError, match="No space left"):
        metrics.plot(tmp_path, 100.0)
    assert not (tmp_path / metrics.CURVES).exists()
