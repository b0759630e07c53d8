"""The suite on the Pythons and torches that people have: `uvx nox`, or one of them by its name in `uvx nox --list`.

What follows `--` is given to pytest.
"""

import nox

nox.options.default_venv_backend = "uv|virtualenv"


@nox.session(python="3.11")
def constrained(session: nox.Session) -> None:
    """The versions of constraints.txt, as in the README."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize(("python", "torch"), [("3.12", "2.9.1"), ("3.13", "2.8.0")])
def tests(session: nox.Session, torch: str) -> None:
    """A torch that is there already, which the installation must leave alone."""
    session.install(f"torch=={torch}", f"torchaudio=={torch}")
    session.install("-e", ".[test]")
    session.run("python", "-c", f"import torch; assert torch.__version__.split('+')[0] == {torch!r}, torch.__version__")
    session.run("pytest", *session.posargs)
