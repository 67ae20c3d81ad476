"""What is written where: through links, into pipes and devices, never in their place."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.errors import ConfigError
from megatron_adamba.files import write_atomically


def read_in_thread(pipe: Path) -> tuple[threading.Thread, list[bytes]]:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    thread.start()
    return thread, found


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    (tmp_path / "second").symlink_to("elsewhere/target")
    link.symlink_to("second")
    for content in (b"first", b"second"):
        # nothing is there yet, and then the first
        write_atomically(link, content)
        assert link.is_symlink() and target.read_bytes() == content and not target.is_symlink()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_pipe_takes_what_is_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        thread, found = read_in_thread(tmp_path / name)
        content = os.urandom(300_000)
        write_atomically(tmp_path / name, content)
        thread.join(30)
        assert found == [content] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_device_is_not_replaced(tmp_path):
    try:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with open(tmp_path / "null", "wb"):
            pass
    except PermissionError:
        pytest.skip("devices cannot be made here")
    write_atomically(tmp_path / "null", b"x")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_what_takes_no_bytes_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="no file"):
            write_atomically(tmp_path / "socket", b"x")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "circle", b"x")
    assert (tmp_path / "circle").is_symlink() and stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_standard_output_by_its_name(tmp_path, kind):
    """What was printed before stays in front, and what comes behind is not lost. The name is a link of our own that
    leads where the system's does: code that fails here must not replace that one."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = (
        "import sys; from pathlib import Path; from megatron_adamba.files import write_atomically; print('before'); "
        "write_atomically(Path(sys.argv[1]), b'between\\n'); print('behind')"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "stdout")]
    if kind == "pipe":
        out = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    else:
        with open(tmp_path / "out", "wb") as stream:
            subprocess.run(words, stdout=stream, check=True, timeout=60)
        out = (tmp_path / "out").read_bytes()
    assert out == b"before\nbetween\nbehind\n" and (tmp_path / "stdout").is_symlink()


def test_a_command_writes_into_a_pipe(adamba, tmp_path):
    (tmp_path / "rows").write_text(json.dumps({"rows": [{"width": 8, "nats_per_token": 1.0, "exit_layer": None}]}))
    os.mkfifo(tmp_path / "pipe")
    thread, found = read_in_thread(tmp_path / "pipe")
    code, _, err = adamba("compare-evaluations", tmp_path / "rows", "--json", tmp_path / "pipe")
    thread.join(30)
    assert code == 0 and json.loads(found[0]), err


def build(prefix: Path, tokens: list[int]) -> None:
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_document(tokens, 3)
        builder.finalize()


def test_a_dataset_is_written_behind_links(tmp_path):
    (tmp_path / "disk").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"set{suffix}").symlink_to(f"disk/other{suffix}")
    # of a process that is gone
    (tmp_path / "disk" / "other.bin.tmp-999999999").write_bytes(b"x")
    for tokens in ([1, 2, 3], [4, 5]):
        build(tmp_path / "set", tokens)
        assert (tmp_path / "set.bin").is_symlink() and (tmp_path / "set.idx").is_symlink()
        assert IndexedDataset(tmp_path / "set").document(0).tolist() == tokens
    assert sorted(os.listdir(tmp_path / "disk")) == ["other.bin", "other.idx"]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".bytes", ".meta.json"])
def test_a_dataset_does_not_take_the_place_of_a_pipe(tmp_path, suffix):
    os.mkfifo(tmp_path / f"set{suffix}")
    with pytest.raises(ConfigError, match=rf"--output .*set: .*set{suffix} is a pipe or a device; give another name"):
        build(tmp_path / "set", [1, 2, 3])
    assert os.listdir(tmp_path) == [f"set{suffix}"]
