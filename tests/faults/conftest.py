import pytest
from children import EACH_STEP, SCRIPTS, Child, run_script


@pytest.fixture
def start(tmp_path):
    """Start a function, or a script of `SCRIPTS`, in a process that does not outlive the test."""
    children = []

    def start(function, *arguments):
        output = tmp_path / f"output{len(children)}.txt"
        children.append(Child(output, function, *arguments))
        return children[-1]

    yield start
    for child in children:
        child.end()


@pytest.fixture
def run(start):
    """Start a script of `SCRIPTS` with a checkpoint after each step."""

    def run(name, folder, *more, fault=None):
        script, arguments = SCRIPTS[name]
        arguments = [*arguments, *EACH_STEP, "--out-dir", str(folder), *more]
        return start(run_script, script, arguments, fault)

    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of a script, and the seconds that it took."""
    folder, seconds = tmp_path_factory.mktemp("whole"), {}

    def whole(name):
        path = folder / name.replace(" ", "_")
        if name not in seconds:
            script, arguments = SCRIPTS[name]
            output = path.with_suffix(".txt")
            child = Child(output, run_script, script, [*arguments, "--out-dir", str(path)])
            assert child.wait() == 0, child.printed()
            seconds[name] = child.seconds
        return path, seconds[name]

    return whole
