"""Files of GPT-NeoX and Megatron-LM, written here byte by byte: what they hold comes out, and their lies are named."""

import errno
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_files import TYPES, index_bytes, read_pair, write_pair

from tokenformer.data import MegatronData, megatron
from tokenformer.errors import UserError

# Six sequences in five documents; one document and one sequence are empty.
DOCUMENTS = [[[5, 6, 7]], [[8], [9, 10]], [], [[]], [[11, 12, 13, 14], [0]]]
FLAT = [[5, 6, 7], [8, 9, 10], [], [], [11, 12, 13, 14, 0]]


@pytest.fixture
def pair(tmp_path: Path) -> str:
    return write_pair(tmp_path / "pile_0.87_text_document", DOCUMENTS)


@pytest.mark.parametrize("code", TYPES)
def test_every_integer_type(tmp_path, code):
    limits = np.iinfo(TYPES[code])
    documents = [[[0, 1, 2]], [[min(limits.max, 2**40)], [3, 4]]]
    data = MegatronData.open(write_pair(tmp_path / "x", documents, code))
    assert [ids.tolist() for ids in data.documents()] == [[0, 1, 2], [min(limits.max, 2**40), 3, 4]]
    assert data[0].dtype == data.dtype == np.dtype(TYPES[code])
    assert data.rows(2)["input_ids"][:] == [[0, 1], [2, min(limits.max, 2**40)], [3, 4]]


@pytest.mark.parametrize("ending", ["", ".idx", ".bin"])
@pytest.mark.parametrize("kind", [str, Path])
def test_documents(pair, ending, kind):
    data = MegatronData.open(kind(pair + ending))
    assert [ids.tolist() for ids in data.documents()] == [ids.tolist() for ids in data] == FLAT
    assert data.lengths.tolist() == [3, 3, 0, 0, 5]
    assert (len(data), data.num_sequences, data.num_tokens, str(data.prefix)) == (5, 6, 11, pair)
    assert data[-1].tolist() == FLAT[-1]
    assert not data[0].flags.writeable
    for index in (5, -6):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11, 12])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (1, None), (1, 4), (4, 5), (2, 4), (5, None)])
def test_rows_are_documents_end_to_end(pair, length, start, stop):
    stream = [id_ for ids in FLAT[start:stop] for id_ in ids]
    expected = [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
    for vocab_size in (None, 15):
        rows = MegatronData.open(pair, vocab_size=vocab_size).rows(length, start, stop)
        assert [row["input_ids"] for row in rows] == expected
        assert len(rows) == len(expected)


def test_rows_are_not_copied(pair):
    data = MegatronData.open(pair)
    first, last = data[0], data[4]
    column = data.rows(3).data.column("input_ids").chunk(0)
    address = column.values.buffers()[1].address
    assert first.__array_interface__["data"][0] == address
    assert last.__array_interface__["data"][0] == address + 6 * 2


def test_worker_processes_open_the_files_again(pair):
    data = MegatronData.open(pair, vocab_size=15)
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert [ids.tolist() for ids in received] == FLAT
    assert received.vocab_size == 15


def test_files_larger_than_memory_and_than_32_bits(tmp_path):
    sizes = [2**31 - 1, 2**31 - 1, 2**31 - 1, 3]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ4i", 1, 4, 4, 5, *sizes)
    index += struct.pack("<4q", *(4 * sum(sizes[:i]) for i in range(4))) + struct.pack("<5q", *range(5))
    (tmp_path / "x.idx").write_bytes(index)
    with open(tmp_path / "x.bin", "wb") as file:  # sparse: 26 GB that take no space
        file.truncate(4 * sum(sizes))
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<2i", 7, 8))
    data = MegatronData.open(tmp_path / "x", vocab_size=9)
    assert (data.num_tokens, data[3].tolist()) == (sum(sizes), [0, 7, 8])
    assert data.rows(4096)[-1]["input_ids"][-4:] == [0, 0, 7, 8]  # 4096 divides the number of tokens
    assert data.rows(3, start=3)[0]["input_ids"] == [0, 7, 8]


def test_text_in_multimodal_layout(tmp_path):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    index = index_bytes(DOCUMENTS)
    Path(f"{prefix}.idx").write_bytes(index + bytes(6))
    assert [ids.tolist() for ids in MegatronData.open(prefix)] == FLAT
    Path(f"{prefix}.idx").write_bytes(index + bytes([0, 0, 1, 0, 0, 0]))
    with pytest.raises(UserError, match="is multimodal: sequence 2 is not text"):
        MegatronData.open(prefix)


def field(offset: int, format: str, value: int):
    """Overwrite a field of the index."""

    def change(index: bytearray, _: bytearray) -> None:
        struct.pack_into(format, index, offset, value)

    return change


def cut(index_end: int | None = None, binary_end: int | None = None):
    def change(index: bytearray, binary: bytearray) -> None:
        del index[len(index) if index_end is None else index_end :]
        del binary[len(binary) if binary_end is None else binary_end :]

    return change


def longer(index_bytes: int, binary_bytes: int):
    def change(index: bytearray, binary: bytearray) -> None:
        index.extend(bytes(index_bytes))
        binary.extend(bytes(binary_bytes))

    return change


def no_boundary(index: bytearray, _: bytearray) -> None:
    struct.pack_into("<Q", index, 26, 0)
    del index[BOUNDARIES:]


SIZES, POINTERS, BOUNDARIES = 34, 34 + 6 * 4, 34 + 6 * 12
LIES = {
    "foreign": (field(0, "<q", 0x04034B50), r"is no index of Megatron or GPT-NeoX: it begins with b'PK"),
    "last byte of the magic": (field(8, "<B", 1), "is no index of Megatron or GPT-NeoX"),
    "old format": (field(0, "<q", struct.unpack("<q", b"TNTIDX\0\0")[0]), "older format TNTIDX.* --dataset-impl mmap"),
    "version": (field(9, "<Q", 2), "has version 2 of its format, only 1 is known"),
    "float": (field(17, "<B", 6), r"floating-point numbers \(type 6\)"),
    "double": (field(17, "<B", 7), r"floating-point numbers \(type 7\)"),
    "type 0": (field(17, "<B", 0), "no type of ids has the number 0"),
    "type 9": (field(17, "<B", 9), "no type of ids has the number 9"),
    "wider type": (field(17, "<B", 4), "sequence 1 begins at byte 6 of .*, but those before it end at byte 12"),
    "more sequences": (field(18, "<Q", 7), "announces 7 sequences and 6 document boundaries, .* 166 bytes, .* 154"),
    "absurd number of sequences": (field(18, "<Q", 2**64 - 1), "announces 18446744073709551615 sequences"),
    "number that overflows": (field(18, "<Q", 2**62), "announces 4611686018427387904 sequences"),
    "absurd number of boundaries": (field(26, "<Q", 2**61), "6 sequences and 2305843009213693952 document"),
    "fewer boundaries": (field(26, "<Q", 5), "announces 6 sequences and 5 document boundaries"),
    "no boundary": (no_boundary, "it has no document boundaries"),
    "empty index": (cut(0), "it has 0 bytes, its header alone 34"),
    "cut in the magic": (cut(5), "it has 5 bytes, its header alone 34"),
    "cut in the header": (cut(33), "it has 33 bytes, its header alone 34"),
    "cut after the header": (cut(34), "but it has 34"),
    "cut in the sizes": (cut(50), "but it has 50"),
    "last byte gone": (cut(153), "but it has 153"),
    "one byte more": (longer(1, 0), "but it has 155"),
    "negative size": (field(SIZES + 8, "<i", -2), "sequence 2 has the size -2"),
    "most negative size": (field(SIZES, "<i", -(2**31)), "sequence 0 has the size -2147483648"),
    "larger size": (field(SIZES, "<i", 4), "sequence 1 begins at byte 6 .* end at byte 8"),
    "larger last size": (field(SIZES + 20, "<i", 2), r"has 22 bytes, but its index .* says at least 24"),
    "huge size": (field(SIZES + 20, "<i", 2**31 - 1), "has 22 bytes, but its index"),
    "pointer not aligned": (field(POINTERS + 8, "<q", 7), "sequence 1 begins at byte 7 .* end at byte 6"),
    "pointer back": (field(POINTERS + 16, "<q", 0), "sequence 2 begins at byte 0 .* end at byte 8"),
    "pointer negative": (field(POINTERS + 40, "<q", -2), "sequence 5 begins at byte -2"),
    "pointer beyond the end": (field(POINTERS + 40, "<q", 2**40), "sequence 5 begins at byte 1099511627776"),
    "pointer that overflows": (field(POINTERS, "<q", 2**63 - 1), "sequence 0 begins at byte 9223372036854775807"),
    "first boundary": (field(BOUNDARIES, "<q", 1), "documents begin at sequence 1 and end at sequence 6"),
    "last boundary": (field(BOUNDARIES + 40, "<q", 5), "end at sequence 5, not at 0 and 6"),
    "boundary beyond the end": (field(BOUNDARIES + 40, "<q", 2**62), "end at sequence 4611686018427387904"),
    "boundaries fall": (field(BOUNDARIES + 8, "<q", 4), "document 1 ends before it begins"),
    "boundary negative": (field(BOUNDARIES + 8, "<q", -(2**63)), "document 0 ends before it begins"),
    "binary cut": (
        cut(None, 21),
        "x.bin' has 21 bytes, but its index .*x.idx' says at least 22: one of them is cut off",
    ),
    "binary of half its length": (cut(None, 10), "has 10 bytes, but its index"),
    "binary empty": (cut(None, 0), "has 0 bytes, but its index"),
    "binary longer": (longer(0, 2), "has 24 bytes, but its index .* says 22"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_lies_are_named(tmp_path, change, message):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    index, binary = bytearray(Path(f"{prefix}.idx").read_bytes()), bytearray(Path(f"{prefix}.bin").read_bytes())
    change(index, binary)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(binary)
    with pytest.raises(UserError, match=message) as raised:
        MegatronData.open(prefix)
    assert str(tmp_path / "x.") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [SIZES, POINTERS, BOUNDARIES])
def test_lies_beyond_the_first_block(tmp_path, monkeypatch, change):
    monkeypatch.setattr(megatron, "_BLOCK", 2)
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    assert [ids.tolist() for ids in MegatronData.open(prefix)] == FLAT
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    width = 4 if change == SIZES else 8
    index[change + 4 * width] ^= 0x40
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(UserError, match=r"sequence [45]|document 4|documents begin"):
        MegatronData.open(prefix)


@pytest.mark.parametrize("documents", [[], [[]], [[[]], [[], []]]])
def test_files_without_tokens(tmp_path, documents):
    with pytest.raises(UserError, match=r"x\.bin' holds no tokens"):
        MegatronData.open(write_pair(tmp_path / "x", documents))


@pytest.mark.parametrize("ending", [".idx", ".bin"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "permission"])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, ending, kind):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    path = Path(prefix + ending)
    if kind == "permission":
        open_ = open

        def refuse(file, *args, **kwargs):
            if file == path:
                raise PermissionError(errno.EACCES, "Permission denied")
            return open_(file, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refuse)
        message = f"cannot read '{path}': Permission denied"
    else:
        path.unlink()
        message = f"'{path}' is a folder, a pipe or a device"
        if kind == "missing":
            message = f"no file '{path}': tokenised data is a pair of files"
        elif kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
    with pytest.raises(UserError) as raised:
        MegatronData.open(prefix)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("code", "id_", "vocab_size", "message"),
    [
        (8, 500, 500, "the id 500 at token 5, outside the vocabulary of 500: it was made with another tokenizer"),
        (4, 2**31 - 1, 500, "the id 2147483647 at token 5"),
        (5, 2**62, 500, "the id 4611686018427387904 at token 5"),
        (4, -1, 500, "the id -1 at token 5, outside the vocabulary of 500"),
        (2, -100, None, "the negative id -100 at token 5"),
        (8, 500, 501, None),
        (8, 65535, None, None),
    ],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_ids_outside_the_vocabulary(tmp_path, monkeypatch, code, id_, vocab_size, message, sampled):
    prefix = write_pair(tmp_path / "x", [[[1, 2]], [[3, 4, 5, id_]], [[6, 7]]], code)
    if not sampled:  # the first and the last two ids only
        monkeypatch.setattr(megatron, "_SAMPLE_PIECES", 2)
        monkeypatch.setattr(megatron, "_SAMPLE_PIECE", 2)
    if sampled and message:
        with pytest.raises(UserError, match=message):
            MegatronData.open(prefix, vocab_size=vocab_size)
        return
    data = MegatronData.open(prefix, vocab_size=vocab_size)
    rows = data.rows(4)
    assert (data[0].tolist(), data[2].tolist()) == ([1, 2], [6, 7])
    assert rows[0]["input_ids"] == [1, 2, 3, 4]
    if message is None:
        assert data[1].tolist() == [3, 4, 5, id_]
        assert rows[1]["input_ids"] == [5, id_, 6, 7]
        return
    with pytest.raises(UserError, match=message):
        data[1]
    if vocab_size is not None:
        with pytest.raises(UserError, match=f"x.bin' holds the id {id_}, outside the vocabulary of {vocab_size}"):
            rows[1]


def test_sample_reaches_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_SAMPLE_PIECES", 3)
    monkeypatch.setattr(megatron, "_SAMPLE_PIECE", 2)
    for at in (0, 1, 98, 99):
        ids = [1] * 100
        ids[at] = 9
        with pytest.raises(UserError, match=f"the id 9 at token {at},"):
            MegatronData.open(write_pair(tmp_path / "x", [[ids]]), vocab_size=9)


def test_fingerprint_tells_files_apart(tmp_path):
    documents = [[[1, 2, 3]], [[4], [5, 6]]]
    others = [[[[1, 2, 3]], [[4, 5], [6]]], [[[1, 2, 3]], [[4], [5, 7]]], [[[1, 2, 3]], [[4], [5, 6], []]]]
    prints = [
        MegatronData.open(write_pair(tmp_path / f"x{number}", each)).fingerprint
        for number, each in enumerate([documents, documents, *others])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


sequences = st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3)
ANYTHING = st.integers(0, 2**64 - 1) | st.integers(0, 12) | st.integers(2**31 - 3, 2**31 + 3)
MANGLES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 400), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 400), st.sampled_from([".idx", ".bin"])),
    st.tuples(st.just("insert"), st.integers(0, 400), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("extend"), st.sampled_from([".idx", ".bin"]), st.binary(min_size=1, max_size=24)),
    st.tuples(st.just("header"), st.sampled_from([9, 18, 26]), ANYTHING),
    st.tuples(st.just("entry"), st.integers(0, 40), ANYTHING),
    st.tuples(st.just("code"), st.integers(0, 255), st.none()),
)


def mangle(kind: str, where: object, value: object, prefix: str, num_sequences: int) -> None:
    path = Path(prefix + (where if kind == "extend" else value if kind == "cut" else ".idx"))
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[where % len(data)] ^= value
    elif kind == "cut":
        del data[where % (len(data) + 1) :]
    elif kind == "insert":
        at = where % (len(data) + 1)
        data[at:at] = value
    elif kind == "extend":
        data += value
    elif kind == "header":
        struct.pack_into("<Q", data, where, value)
    elif kind == "entry":  # a size, or else a pointer or a boundary
        if where < num_sequences:
            struct.pack_into("<I", data, 34 + 4 * where, value % 2**32)
        else:
            count = (len(data) - 34 - 4 * num_sequences) // 8
            struct.pack_into("<Q", data, 34 + 4 * num_sequences + 8 * (where % count), value)
    else:
        data[17] = where
    path.write_bytes(data)


@settings(max_examples=400, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=5), st.sampled_from(sorted(TYPES)), MANGLES)
def test_mangled_files_are_refused_or_read_as_they_are(tmp_path_factory, documents, code, change):
    prefix = write_pair(tmp_path_factory.getbasetemp() / "mangled", documents, code)
    mangle(*change, prefix, sum(map(len, documents)))
    try:
        data = MegatronData.open(prefix)
        found = [ids.tolist() for ids in data.documents()]
        rows = [row["input_ids"] for row in data.rows(3)]
    except UserError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert prefix in refusal
        assert "\n" not in refusal
        return
    expected = read_pair(prefix)
    stream = [id_ for ids in expected for id_ in ids]
    assert found == expected
    assert rows == [stream[at : at + 3] for at in range(0, len(stream) - 2, 3)]
    assert data.lengths.tolist() == [len(ids) for ids in expected]
    assert len(stream) == data.num_tokens
