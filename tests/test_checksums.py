"""SHA256SUMS is what sha256sum makes and checks, and a changed folder is refused by the file's name."""

import subprocess

import pytest

from megavar.checksums import check_checksums, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.bin", "a b.json", ".hidden", "sub/c"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    write_checksums(tmp_path)
    return tmp_path


def test_sha256sum_accepts_the_file_and_makes_the_same(folder):
    assert subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=folder).returncode == 0
    names = [".hidden", "a b.json", "b.bin", "sub/c"]
    made = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True).stdout
    assert (folder / "SHA256SUMS").read_text() == made


def test_a_whole_folder_one_with_more_files_and_one_without_checksums_pass(folder):
    check_checksums(folder)
    (folder / "README").write_text("added")
    check_checksums(folder)
    (folder / "b.bin").write_text("changed")
    (folder / "SHA256SUMS").unlink()
    check_checksums(folder)


@pytest.mark.parametrize("name", ["b.bin", "a b.json", "sub/c"])
def test_a_changed_or_missing_file_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} has another checksum: .* is not what SHA256SUMS in it says"):
        check_checksums(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        check_checksums(folder)


@pytest.mark.parametrize("line", ["x", "0" * 64 + "  ../b", "0" * 64 + "  /etc/passwd", "0" * 63 + "  b", "\0"])
def test_a_file_in_another_format_is_refused_by_line(folder, line):
    (folder / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text() + line + "\n")
    with pytest.raises(ValueError, match="SHA256SUMS, line 5: expected a SHA-256"):
        check_checksums(folder)
