import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from repro.output import Kept, captured, own_stderr


@given(parts=st.lists(st.binary(max_size=40), max_size=20), limit=st.integers(1, 30))
def test_first_and_last_bytes_are_kept(parts, limit):
    kept, whole = Kept(limit), b"".join(parts)
    for part in parts:
        kept.add(part)
    if len(whole) <= 2 * limit:
        assert kept.bytes() == whole
    else:
        left_out = f"\n... {len(whole) - 2 * limit:,} bytes left out ...\n".encode()
        assert kept.bytes() == whole[:limit] + left_out + whole[-limit:]


def test_python_c_and_children_are_captured_and_the_terminal_is_given_back(capfd):
    found = []
    with captured(found.append):
        os.write(1, b"from C\n")
        os.write(2, b"an error\n")
        subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
    os.write(1, b"after\n")
    assert found == [b"from C\nan error\na child\n"]
    assert capfd.readouterr().out == "after\n"


def test_nothing_printed_keeps_nothing(capfd):
    found = []
    with captured(found.append):
        pass
    assert found == []


def test_an_exception_gives_the_terminal_back(capfd):
    found = []
    try:
        with captured(found.append):
            os.write(1, b"before it\n")
            raise KeyError("x")
    except KeyError:
        os.write(1, b"after it\n")
    assert (found, capfd.readouterr().out) == ([b"before it\n"], "after it\n")


def test_messages_reach_the_user_meanwhile(capfd):
    code = (
        "import os\n"
        "from repro.output import captured, own_stderr\n"
        "stream = own_stderr()\n"
        "with captured(lambda data: None):\n"
        "    os.write(2, b'hidden')\n"
        "    print('shown', file=stream, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "shown\n")


def test_own_stderr_without_a_descriptor(monkeypatch):
    import io

    replaced = io.StringIO()
    monkeypatch.setattr(sys, "stderr", replaced)
    assert own_stderr() is replaced
