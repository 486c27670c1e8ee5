from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from antibackdoor.defenses import make_defense
from antibackdoor.defenses.e2abl import E2ABL
from antibackdoor.errors import InputError
from antibackdoor.options import build, options, values
from antibackdoor.registry import Registry
from antibackdoor.training.loop import Recipe


@options
class Inner:
    size: Annotated[int, Field(ge=1)] = 2
    rate: float = 0.5


@options
class Outer:
    name: str | None = None
    mode: Literal["a", "b"] = "a"
    on: bool = False
    inner: Inner = Inner()
    maybe: Inner | None = Inner()
    many: list[int] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"name": "x", "on": "true", "mode": "b"}, Outer(name="x", on=True, mode="b")),
        ({"name": "0"}, Outer(name="0")),
        ({"name": "null", "maybe": "null"}, Outer(maybe=None)),
        ({"many": "[1, 2]"}, Outer(many=[1, 2])),
        ({"inner.size": "7"}, Outer(inner=Inner(size=7))),
        ({"inner.size": 7, "inner.rate": "1e-3"}, Outer(inner=Inner(size=7, rate=0.001))),
        ({"inner": {"rate": 1}}, Outer(inner=Inner(rate=1.0))),
        ({"maybe": {"size": 3}}, Outer(maybe=Inner(size=3))),
    ],
)
def test_settings(settings: dict[str, Any], want: Outer) -> None:
    assert build(Outer, settings, "thing") == want


def test_settings_override_a_base_and_leave_its_other_parts() -> None:
    got = build(Outer, {"inner.size": 9}, "thing", base={"inner": Inner(rate=0.9), "name": "base"})
    assert got == Outer(name="base", inner=Inner(size=9, rate=0.9))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nmae": 1}, "unknown option of thing 'nmae': did you mean 'name'"),
        ({"inner.sise": 1}, "unknown option of thing, inner 'sise': did you mean 'size'"),
        ({"zzz": 1}, "known: inner, many"),
        ({"mode": "c"}, "mode='c' is not valid"),
        ({"inner.size": 0}, "thing, inner: size=0 is not valid"),
        ({"inner.size": "many"}, "size='many'"),
        ({"inner.rate": "inf"}, "rate='inf' is not valid: Input should be a finite number"),
        ({"inner.rate": float("nan")}, "finite number"),
        ({"name.part": 1}, "'name' has no parts"),
        ({"maybe": None, "maybe.size": 1}, "'maybe' has no parts"),
        ({"inner": "3"}, "inner"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(Outer, settings, "thing")


def test_options_are_frozen_and_take_no_strangers() -> None:
    with pytest.raises((AttributeError, ValidationError)):
        Inner().size = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Inner(sise=3)  # type: ignore[call-arg]
    with pytest.raises((TypeError, ValidationError)):
        Inner(3)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["none", "e2abl", "e2abl:paper"])
def test_values_give_the_method_back(name: str) -> None:
    method = make_defense(name)
    assert make_defense(name.split(":", maxsplit=1)[0], values(method)) == method


def test_profiles() -> None:
    paper = make_defense("e2abl:paper", {"main.batch_size": 64})
    assert isinstance(paper, E2ABL) and paper.ranking == "loss_drop"
    assert paper.main == Recipe(**{**E2ABL.profiles["paper"]["main"].__dict__, "batch_size": 64})
    with pytest.raises(InputError, match="unknown profile of e2abl 'papr': did you mean 'paper'"):
        make_defense("e2abl:papr")
    with pytest.raises(InputError, match="unknown defense 'e2able': did you mean 'e2abl'"):
        make_defense("e2able")


def test_registry() -> None:
    things: Registry[Any] = Registry("thing")

    @things.register("b", paper="P", kinds=("image",))
    def b() -> None:
        """Say b.

        More.
        """

    things.register("a")(b)
    assert [entry.name for entry in things] == ["a", "b"] and "a" in things and "c" not in things
    assert (things["b"].description, things["b"].paper, things["b"].kinds) == ("Say b.", "P", ("image",))
    with pytest.raises(RuntimeError, match="registered twice"):
        things.register("a")(b)
    with pytest.raises(RuntimeError, match="no docstring"):
        things.register("c")(lambda: None)
    with pytest.raises(InputError, match="unknown thing 'bb': did you mean 'b'"):
        things["bb"]
