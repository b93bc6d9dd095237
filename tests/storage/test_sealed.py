from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nni_jackpot.errors import OutputFolderError, TicketError
from nni_jackpot.runtime.tensor_bytes import from_bytes
from nni_jackpot.storage.formats.sealed import digest_of, read_parts, read_sealed, write_sealed
from nni_jackpot.storage.formats.sealed_format import TYPES

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "empty": torch.zeros(0, 2),
    "scalar": torch.tensor(7),
    "turned": torch.randn(4, 6).t(),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"numbers": [1, 2.5, None], "text": "ü"}
    write_sealed(tmp_path / "new" / "file", "thing", 3, content, TENSORS)
    found, tensors = read_sealed(tmp_path / "new" / "file", "thing", 3)
    assert found == content
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    for name, content in (
        ("a", {2: (1, 2), 10: None, "ü": True}),
        ("b", {"2": [1, 2], "10": None, "ü": True}),
    ):
        write_sealed(tmp_path / name, "thing", 1, content, TENSORS)
        assert read_sealed(tmp_path / name, "thing", 1)[0] == {"2": [1, 2], "10": None, "ü": True}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    write_sealed(tmp_path / "file", "thing", 1, None, TENSORS)
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_sealed(path, "thing", 1, None, TENSORS)
    _, tensors = read_sealed(path, "thing", 1)
    path.write_bytes(b"")
    assert torch.equal(tensors["half"], TENSORS["half"])


def test_older_versions_are_read_and_newer_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_sealed(path, "thing", 2, None, {})
    read_sealed(path, "thing", 3)
    with pytest.raises(TicketError, match="version 2, and this nni_jackpot reads up to 1: take a newer"):
        read_sealed(path, "thing", 1)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(TicketError, match="there is no thing"):
        read_sealed(path, "thing", 1)
    with pytest.raises(TicketError, match="is not a thing"):
        read_sealed(tmp_path, "thing", 1)
    for raw in (b"", b"text", torch.arange(100).numpy().tobytes()):
        path.write_bytes(raw)
        with pytest.raises(TicketError, match="is not a thing, or is damaged"):
            read_sealed(path, "thing", 1)
    save_file(TENSORS | {"turned": TENSORS["turned"].contiguous()}, path)
    with pytest.raises(TicketError, match="but another safetensors file"):
        read_sealed(path, "thing", 1)
    write_sealed(path, "other", 1, None, {})
    with pytest.raises(TicketError, match="is not a thing, but other"):
        read_sealed(path, "thing", 1)


def test_any_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_sealed(path, "thing", 1, {"a": 1}, {"t": torch.arange(4)})
    raw = path.read_bytes()
    for bit in range(0, 8 * len(raw), 7):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            content, tensors = read_sealed(path, "thing", 1)
        except TicketError:
            continue
        assert content == {"a": 1}
        assert torch.equal(tensors["t"], torch.arange(4))


def test_digests_tell_type_shape_and_values_apart() -> None:
    zeros = torch.zeros(2, 3)
    others = [
        zeros,
        zeros.view(3, 2),
        zeros.int(),
        zeros.half(),
        torch.zeros(2, 4),
        -zeros,
        torch.zeros(0),
        torch.zeros(0, 3),
    ]
    assert len({digest_of(tensor) for tensor in others}) == len(others)
    turned = torch.arange(6).view(2, 3).t()
    assert digest_of(turned) == digest_of(turned.contiguous())
    assert digest_of(zeros).hex() == "029b562d8f68dcae1fd612e6c19a2ad4e09af1c74903f48605825304d2e4a413"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputFolderError):
        write_sealed(tmp_path / "file" / "below", "thing", 1, None, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputFolderError):
        write_sealed(tmp_path / "folder", "thing", 1, None, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_newer_version_is_said_to_be_newer_whatever_else_it_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    envelope = {"version": 2, "contents": [], "signature": None}
    save_file({"a": torch.ones(1)}, path, {"thing": json.dumps(envelope)})
    with pytest.raises(TicketError, match=r"version 2, .*: take a newer"):
        read_sealed(path, "thing", 1)
    save_file({"a": torch.ones(1)}, path, {"thing": json.dumps(envelope | {"version": 1})})
    with pytest.raises(TicketError, match="is damaged"):
        read_sealed(path, "thing", 1)


def test_booleans_are_zeros_and_ones(tmp_path: Path) -> None:
    path, wrong = tmp_path / "file", torch.tensor([0, 1, 2], dtype=torch.uint8).view(torch.bool)
    write_sealed(path, "thing", 1, None, {"a": wrong})
    with pytest.raises(TicketError, match="tensor a: bytes of type `BOOL` are 0 or 1"):
        read_sealed(path, "thing", 1)
    write_sealed(path, "thing", 1, None, {"a": torch.tensor([True, False])})
    assert read_sealed(path, "thing", 1)[1]["a"].tolist() == [True, False]


def test_bytes_are_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_sealed(path, "thing", 1, [1], {"a": from_bytes(b"abc"), "b": from_bytes(b"")})
    assert read_parts(path, "thing", 1) == ([1], {"a": b"abc", "b": b""})
    write_sealed(path, "thing", 1, [1], {"a": torch.ones(3)})
    with pytest.raises(TicketError, match="tensors are of type `U8`"):
        read_parts(path, "thing", 1)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    every = {
        code: torch.zeros(2, 3, dtype=torch.uint8).to(dtype)
        for code, dtype in TYPES.items()
        if "F8" not in code
    }
    every |= {code: torch.zeros(2, 3).to(dtype) for code, dtype in TYPES.items() if "F8" in code}
    write_sealed(path, "thing", 1, None, every)
    _, found = read_sealed(path, "thing", 1)
    with safe_open(path, "pt") as file:
        for code, tensor in every.items():
            assert file.get_slice(code).get_dtype() == code
            assert found[code].dtype == tensor.dtype
            assert found[code].shape == tensor.shape
