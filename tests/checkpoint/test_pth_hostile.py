"""Damage and malice in a .pth file must be noticed: no wrong number, no import, no file, little memory."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.pth.file import open_pth
from npllama.checkpoint.source import Source
from npllama.errors import CorruptDataError, NpllamaError, TruncatedFileError, UnsafeFileError
from tests.checkpoint.archives import Raw, View, archive, call, checkpoint_members, symbol, write_checkpoint
from tests.checkpoint.pth_files import opened, read_all, same, write


class TestDamage:
    TENSORS = {  # noqa: RUF012 - never changed
        "a": np.arange(20, dtype=np.float32).reshape(4, 5),
        "b": np.float32([[1.5, -2], [3, 4]]),
        "scalar": np.array(2.5, np.float32),
    }

    @pytest.mark.parametrize("mask", [0xFF, 0x01])
    def test_every_single_damaged_byte_gives_the_same_numbers_or_a_typed_error(self, tmp_path: Path, mask: int) -> None:
        path = write_checkpoint(tmp_path / "x.pth", self.TENSORS)
        content = path.read_bytes()
        refused = 0
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            try:
                found = read_all(path)
            except NpllamaError:
                refused += 1
            else:
                assert same(found, self.TENSORS), position
        assert refused > sum(array.nbytes for array in self.TENSORS.values())

    def test_every_truncation_is_a_typed_error(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "x.pth", self.TENSORS)
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(NpllamaError):
                open_pth(path)

    def test_every_extension_is_a_typed_error(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "x.pth", self.TENSORS)
        content = path.read_bytes()
        for extra in range(1, 65):
            path.write_bytes(content + bytes(extra))
            with pytest.raises(CorruptDataError, match=f"{extra} unexpected bytes after"):
                open_pth(path)

    def test_a_damaged_weight_names_its_record(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "x.pth", self.TENSORS)
        content = bytearray(path.read_bytes())
        content[content.index(self.TENSORS["b"].tobytes())] ^= 1
        path.write_bytes(content)
        with opened(path) as file:
            np.testing.assert_array_equal(file.tensors["a"].read(), self.TENSORS["a"])
            with pytest.raises(CorruptDataError, match=r"x\.pth:archive/data/1: the CRC-32 is"):
                file.tensors["b"].read()

    def test_a_damaged_pickle_is_noticed_before_it_is_run(self, tmp_path: Path) -> None:
        members = checkpoint_members(self.TENSORS)
        members[0].crc = 1
        path = tmp_path / "x.pth"
        path.write_bytes(archive(members))
        with pytest.raises(CorruptDataError, match=r"archive/data\.pkl: the CRC-32"):
            open_pth(path)

    def test_files_without_checksums_are_read_when_asked(self, tmp_path: Path) -> None:
        members = checkpoint_members(self.TENSORS)
        for member in members:
            member.crc = 0
        path = tmp_path / "x.pth"
        path.write_bytes(archive(members))
        with pytest.raises(CorruptDataError, match="verify_crc=False"):
            read_all(path)
        assert same(read_all(path, verify_crc=False), self.TENSORS)

    def test_a_file_cut_while_it_is_read_is_noticed(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "x.pth", self.TENSORS)
        with opened(path) as file:
            with path.open("r+b") as handle:
                handle.truncate(100)
            with pytest.raises(TruncatedFileError):
                file.tensors["scalar"].read()


class TestCost:
    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        reads: list[tuple[int, int]] = []
        original = Source.read_into

        def read_into(source: Source, offset: int, buffer: memoryview) -> None:
            reads.append((offset, len(buffer)))
            original(source, offset, buffer)

        monkeypatch.setattr(Source, "read_into", read_into)
        return reads

    def test_a_tensor_read_in_row_blocks_is_read_once(self, tmp_path: Path, counted: list[tuple[int, int]]) -> None:
        path = write_checkpoint(tmp_path / "x.pth", {"w": np.ones((1000, 64), np.float32)})
        with opened(path) as file:
            counted.clear()
            for start in range(0, 1000, 100):
                file.tensors["w"].read_rows(start, start + 100)
            file.tensors["w"].verify()
        assert sum(count for _, count in counted) == 1000 * 64 * 4

    def test_opening_reads_no_weights(self, tmp_path: Path, counted: list[tuple[int, int]]) -> None:
        path = write_checkpoint(tmp_path / "x.pth", {"w": np.ones((1000, 1000), np.float32)})
        with opened(path):
            assert sum(count for _, count in counted) < 20_000

    def test_a_transposed_tensor_is_read_in_little_memory(self, tmp_path: Path) -> None:
        rows, columns = 4000, 3000
        view = View("0", rows * columns, (columns, rows), (1, columns))
        path = write(tmp_path / "x.pth", {"w": view}, {"0": bytes(rows * columns * 4)})
        with opened(path) as file:
            tracemalloc.start()
            try:
                for start in range(0, columns, 100):
                    file.tensors["w"].read_rows(start, start + 100)
                file.tensors["w"].verify()
                assert tracemalloc.get_traced_memory()[1] < 24 << 20
            finally:
                tracemalloc.stop()


# Each line: module, name, arguments. Every one runs code, opens a file or a connection when a real unpickler calls it.
EXPLOITS = """
os system ('touch CANARY',)
posix system ('touch CANARY',)
nt system ('touch CANARY',)
os popen ('touch CANARY',)
os execv ('/bin/touch', ['touch', 'CANARY'])
os open ('CANARY', 577)
os.path join ('a',)
subprocess Popen (['touch', 'CANARY'],)
subprocess check_output (['touch', 'CANARY'],)
builtins eval ("open('CANARY','w')",)
builtins exec ("open('CANARY','w')",)
builtins open ('CANARY', 'w')
builtins __import__ ('antigravity',)
builtins getattr ('', 'join')
builtins compile ('1', 'x', 'exec')
__builtin__ eval ("open('CANARY','w')",)
__builtin__ execfile ('CANARY',)
io open ('CANARY', 'w')
_io open ('CANARY', 'w')
_io FileIO ('CANARY', 'w')
codecs open ('CANARY', 'w')
pathlib Path ('CANARY',)
shutil rmtree ('CANARY',)
tempfile mktemp ()
importlib import_module ('antigravity',)
runpy run_path ('CANARY',)
runpy _run_code ("open('CANARY','w')", {})
pip main (['install', 'x'],)
pip._internal main (['install', 'x'],)
pickle loads ('x',)
marshal loads ('x',)
code interact ()
timeit timeit ("open('CANARY','w')",)
cProfile run ("open('CANARY','w')",)
pdb run ("open('CANARY','w')",)
pty spawn ('sh',)
ctypes CDLL ('libc.so.6',)
functools partial ('x',)
operator attrgetter ('x',)
types CodeType ()
socket create_connection (('127.0.0.1', 9),)
urllib.request urlopen ('http://127.0.0.1:9',)
webbrowser open ('http://127.0.0.1:9',)
logging.config fileConfig ('CANARY',)
numpy.testing._private.utils runstring ("open('CANARY','w')", {})
numpy load ('CANARY',)
torch load ('CANARY',)
torch.hub load ('x', 'y')
torch.jit.unsupported_tensor_ops execWrapper ("open('CANARY','w')", {}, {})
torch.utils.collect_env run ('touch CANARY',)
torch._inductor.codecache compile_file ('CANARY',)
torch.storage _load_from_bytes ('x',)
""".strip().splitlines()

WATCHMAN = """
import json, sys
from npllama.checkpoint.pth.file import open_pth
from npllama.errors import UnsafeFileError
honest, *hostile = json.loads(sys.argv[1])
file = open_pth(honest)
file.tensors["w"].read()
file.source.close()
watching = False
FORBIDDEN = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess", "socket",
             "pty", "ctypes", "shutil", "pickle", "marshal", "webbrowser", "urllib")
def hook(event, arguments):
    if watching and (event.startswith(FORBIDDEN) or event == "open" and not str(arguments[1]).startswith("r")):
        sys.stderr.write(f"{event} {arguments!r}\\n")
        raise SystemExit(9)
sys.addaudithook(hook)
refused = []
for path in hostile:
    watching = True
    try:
        open_pth(path)
    except UnsafeFileError as problem:
        refused.append(str(problem))
    finally:
        watching = False
print(json.dumps(refused))
"""


def test_exploits_are_refused_and_nothing_is_imported_opened_or_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = [str(write_checkpoint(tmp_path / "honest.pth", {"w": np.ones(2, np.float32)}))]
    programs: list[Any] = []
    for line in EXPLOITS:
        module, name, arguments = line.replace("CANARY", str(canary)).split(" ", 2)
        programs.append(call(module, name, *ast.literal_eval(arguments)))
    touch = f"touch {canary}".encode()
    programs += [
        Raw(b"(S'" + touch + b"'\nios\nsystem\n"),
        Raw(b"(cos\nsystem\nX\4\0\0\0trueo"),
        Raw(b"\x8c\2os\x8c\6system\x93\x8c\4true\x85R"),
        Raw(symbol("torch", "Size").code + b")\x81"),
        Raw(symbol("torch", "Size").code + b"}b"),
        Raw(b"\x82\1"),
        Raw(b"P" + touch + b"\n"),
        {"a": call("torch", "float32", 1)},
    ]
    for index, value in enumerate(programs):
        files.append(str(write(tmp_path / f"{index}.pth", value, {})))
    done = subprocess.run(
        [sys.executable, "-c", WATCHMAN, json.dumps(files)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout)
    assert len(refused) == len(programs)
    assert all("Nothing was executed" in message for message in refused)
    assert not canary.exists()


def test_unsafe_errors_name_file_record_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", call("os", "system", "true"), {})
    with pytest.raises(UnsafeFileError) as caught:
        open_pth(path)
    assert str(caught.value).startswith(f"{path}:archive/data.pkl@2: the file asks to import os.system; refused")
