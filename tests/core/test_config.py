"""Configs are frozen trees, and their snapshot says the same tree again or says clearly why not."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.core import config as core
from mmgpt.core.config import Config, ConfigError

MODULE = "mmgpt.sample"


class Layer(Config):
    width: int = 8
    rate: float = 0.5
    kind: Literal["dense", "sparse"] = "dense"


class Wide(Layer):
    factor: int = 2


class Tree(Config):
    layer: Layer = dataclasses.field(default_factory=Layer)
    layers: tuple[Layer, ...] = ()
    size: tuple[int, int] = (2, 3)
    names: list[str] = dataclasses.field(default_factory=list)
    rules: dict[str, float] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    value: int | str = 0
    any_part: Config | None = None


class Plain:
    pass


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above as members of a module of the package, since only those are loaded."""
    module = types.ModuleType(MODULE)
    for cls in (Layer, Wide, Tree, Plain):
        monkeypatch.setattr(cls, "__module__", MODULE)
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, MODULE, module)


def changed(config: Config, **entries: Any) -> str:
    """The snapshot of a config with some entries set, or left out where the value is `...`."""
    data = core.to_dict(config) | entries
    return json.dumps({k: v for k, v in data.items() if v is not ...})


def test_a_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layer().width = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="positional"):
        Layer(3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="wdith"):
        Layer(wdith=3)  # pyright: ignore[reportCallIssue]
    assert Layer().replace(width=3) == Layer(width=3) != Layer()


layers_of = st.builds(
    Layer, width=st.integers(), rate=st.floats(allow_nan=False), kind=st.sampled_from(["dense", "sparse"])
) | st.builds(Wide, factor=st.integers())


@given(
    st.builds(
        Tree,
        layer=layers_of,
        layers=st.lists(layers_of, max_size=3).map(tuple),
        size=st.tuples(st.integers(), st.integers()),
        names=st.lists(st.text(max_size=4), max_size=3),
        rules=st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False), max_size=3),
        limit=st.none() | st.integers(),
        value=st.integers() | st.text(max_size=4),
        any_part=st.none() | layers_of,
    )
)
def test_a_snapshot_gives_the_same_tree(tree: Tree) -> None:
    again = core.from_json(core.to_json(tree))
    assert again == tree
    assert [type(x) for x in again.layers] == [type(x) for x in tree.layers]
    assert core.difference(again, tree) == {}


def test_a_snapshot_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        core.load(path)
    path.write_text(core.to_json(Tree(limit=4)))
    assert core.load(path) == Tree(limit=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'expected a table with a "type"'),
        ('{"type": "mmgpt.sample:Nothing"}', "has no class"),
        ('{"type": "mmgpt.nowhere:Layer"}', "has no class"),
        ('{"type": "mmgpt.sample:Plain"}', "is not a Config"),
        ('{"type": "subprocess:Popen"}', "is not part of mmgpt"),
    ],
)
def test_a_text_that_is_no_snapshot_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core.from_json(text)


def test_a_snapshot_imports_nothing_from_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary.py").write_text("class Bird: pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not loaded"):
        core.from_json('{"type": "canary:Bird"}')
    assert "canary" not in sys.modules


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"witdh": 3}, r"run\.witdh.*Did you mean 'width'"),
        ({"qqqqq": 3}, r"run\.qqqqq.*It has width, rate, kind"),
        ({"width": ...}, "misses width"),
        ({"width": "3"}, r"run\.width: expected int, found '3'"),
        ({"width": 3.5}, r"run\.width: expected int"),
        ({"width": True}, r"run\.width: expected int"),
        ({"rate": True}, r"run\.rate: expected float"),
        ({"kind": "other"}, r"run\.kind: 'other' is not one of 'dense', 'sparse'"),
    ],
)
def test_a_wrong_entry_is_named_with_its_path(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core.from_json(changed(Layer(), **entries), "run")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"layers": [core.to_dict(3)]}, r"layers\[0\]: expected a table"),
        ({"layers": 3}, "layers: expected a list"),
        ({"size": [1, 2, 3]}, "size: expected 2 values, found 3"),
        ({"rules": []}, "rules: expected a table"),
        ({"rules": {"a": "b"}}, r"rules\.a: expected float"),
        ({"limit": "x"}, "limit: expected int"),
        ({"value": []}, "value: .* fits none of"),
        ({"layer": {"type": "mmgpt.sample:Tree"}}, "layer: mmgpt.sample:Tree is not a Layer"),
    ],
)
def test_a_wrong_part_of_the_tree_is_named_with_its_path(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core.from_json(changed(Tree(), **entries))


def test_a_whole_number_is_a_float_too() -> None:
    rate = core.from_json(changed(Layer(), rate=1)).rate
    assert (rate, type(rate)) == (1.0, float)


def test_a_config_holds_only_what_a_snapshot_can_say() -> None:
    with pytest.raises(ConfigError, match="found object"):
        core.to_dict(Tree(names=object()))  # pyright: ignore[reportArgumentType]


def test_leaves_have_dotted_paths_and_the_class_of_each_part() -> None:
    found = core.leaves(Tree(layers=(Layer(), Wide(factor=5)), limit=7))
    assert found["limit"] == 7
    assert found["layer.width"] == 8
    assert found["layers.1.type"] == "mmgpt.sample:Wide"
    assert found["layers.1.factor"] == 5
    assert "type" not in found


def test_the_difference_names_changed_leaves_only() -> None:
    base = Tree()
    assert core.difference(base, base) == {}
    assert core.difference(base.replace(limit=3, layer=Layer(width=9)), base) == {
        "limit": (None, 3),
        "layer.width": (8, 9),
    }
    assert core.difference(base.replace(layer=Wide()), base) == {
        "layer.type": ("mmgpt.sample:Layer", "mmgpt.sample:Wide"),
        "layer.factor": (None, 2),
    }


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("optimizer.learning_rate=3e-4", ["--optimizer.learning-rate", "3e-4"]),
        ("steps=5", ["--steps", "5"]),
        ("name=a=b", ["--name", "a=b"]),
        ("shift=-1", ["--shift", "-1"]),
        ("--steps=5", ["--steps=5"]),
        ("emu3_8b", ["emu3_8b"]),
        ("runs/a=b", ["runs/a=b"]),
        ("model.multiples=(1, 2)", ["--model.multiples", "1", "2"]),
        ("attention=()", ["--attention"]),
        ("prompt=(not a tuple", ["--prompt", "(not a tuple"]),
        ("prompt=(a, b)", ["--prompt", "(a, b)"]),
    ],
)
def test_assignments_become_flags_and_the_rest_stays(given: str, flags: list[str]) -> None:
    assert core.as_flags(["train", given, "--last"]) == ["train", *flags, "--last"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ('{"model_type": "llama"}', "mmgpt convert"),
        ('{"type": ["x"]}', 'a table with a "type"'),
        ('{"type": NaN}', 'a table with a "type"'),
    ],
)
def test_files_that_hold_no_config_are_one_clear_error(text: str, told: str) -> None:
    with pytest.raises(core.ConfigError, match=told):
        core.from_json(text)
