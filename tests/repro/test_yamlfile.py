"""Safe YAML with lines: what is read, and what is refused in one clear line."""

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from repro import yamlfile
from repro.errors import BadInput


def write(tmp_path, text, name="m.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_data_and_lines(tmp_path):
    path = write(tmp_path, "a: 1\nb:\n  - x: 2\n  - {y: [3, 1e-3]}\n")
    file = yamlfile.load(path)
    assert file.data == {"a": 1, "b": [{"x": 2}, {"y": [3, 0.001]}]}
    assert file.where(("b", 1, "y")) == f"{path}:4"
    assert file.where(("b", 1, "unknown", 3)) == f"{path}:4"
    assert file.where(()) == f"{path}:1"


def test_a_key_is_located_on_its_own_line_not_on_its_value(tmp_path):
    file = yamlfile.load(write(tmp_path, "key:\n  inner: 1\n"))
    assert file.lines[("key",)] == 1
    assert file.lines[("key", "inner")] == 2


def test_dates_stay_text_and_anchors_work(tmp_path):
    file = yamlfile.load(write(tmp_path, "d: 2025-03-20\na: &x {k: 1}\nb: *x\n"))
    assert file.data == {"d": "2025-03-20", "a": {"k": 1}, "b": {"k": 1}}


def test_an_empty_file_has_no_data(tmp_path):
    assert yamlfile.load(write(tmp_path, "# nothing\n")).data is None


def test_a_leading_document_marker_and_byte_order_mark_are_fine(tmp_path):
    assert yamlfile.load(write(tmp_path, b"\xef\xbb\xbf# hi\n---\na: 1\n")).data == {"a": 1}


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\na: 2\n", 2, "given once"),
        ("a: 1\n---\nb: 2\n", 2, "one document"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "tags"),
        ("a: !mine 3\n", 1, "tags"),
        ("a: [1, 2\nb: 3\n", 2, "syntax error"),
        ("a:\n\tb: 1\n", 2, "syntax error"),
        (b"a: 1\nb: \xff\n", 2, "UTF-8"),
        (BOMB, None, "aliases expanded"),
        ("a: &a [*a]\n", 1, "nested at most"),
        ("[" * 2000, 1, "nested at most"),
        ("? [a, b]\n: 1\n", 1, "a plain word"),
        ("a: *nowhere\n", 1, "syntax error"),
        ("x" * (yamlfile.MAX_BYTES + 1), None, "at most"),
    ],
)
def test_refused_with_file_and_line(tmp_path, text, line, said):
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        yamlfile.load(path)
    (fault,) = caught.value.faults
    assert said in str(fault)
    assert fault.where.startswith(str(path))
    if line is not None:
        assert fault.where == f"{path}:{line}"
    assert len(str(fault)) < 500


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(BadInput, match="a folder"):
        yamlfile.load(tmp_path)
    with pytest.raises(BadInput, match="No such file"):
        yamlfile.load(tmp_path / "none.yaml")


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    threshold: float = Field(ge=0, le=1)
    stride: int


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    methods: list[Inner]


def test_validation_faults_carry_line_path_rule_value_and_near_match(tmp_path):
    path = write(
        tmp_path,
        "methods:\n  - threshold: 1.5\n    stride: 8\n  - threshold: 0.5\n    strid: 4\n",
    )
    file = yamlfile.load(path)
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(file.data)
    faults = yamlfile.validation_faults(
        file, caught.value.errors(), known={"methods[1]": ["threshold", "stride"]}
    )
    text = sorted(map(str, faults))
    assert text[0].startswith(f"{path}:2: methods[0].threshold must be less than or equal to 1")
    assert text[0].endswith("got 1.5")
    assert text[1].startswith(f"{path}:4: methods[1].stride must be given, got nothing")
    assert text[2].startswith(f"{path}:5: methods[1].strid must be a known key, got 4")
    assert "did you mean stride" in text[2]
