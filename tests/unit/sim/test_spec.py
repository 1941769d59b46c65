import pytest
from hypothesis import given
from hypothesis import strategies as st

from zk0bot.config.load import list_simulated_tasks
from zk0bot.errors import ConfigError, UnknownNameError, Zk0Error
from zk0bot.sim.spec import MAX_EPISODES, SimSpec, parse_sim_uri
from zk0bot.sim.tasks import SECTORS, TASKS

SPECS = st.builds(
    SimSpec,
    task=st.sampled_from(TASKS),
    sector=st.sampled_from(list(SECTORS.values())),
    episodes=st.integers(1, MAX_EPISODES),
    seed=st.integers(0, 2**31 - 1),
)


@given(SPECS)
def test_a_spec_survives_the_way_through_its_uri(spec: SimSpec) -> None:
    assert parse_sim_uri(str(spec)) == spec


@given(SPECS, SPECS)
def test_different_specs_have_different_folders(one: SimSpec, other: SimSpec) -> None:
    assert (one.slug == other.slug) == (one == other)


@given(st.text())
def test_any_text_gives_a_spec_or_an_error_with_a_hint(text: str) -> None:
    try:
        spec = parse_sim_uri("sim:touch-red?" + text)
    except Zk0Error as error:
        assert error.hint
    else:
        assert parse_sim_uri(str(spec)) == spec


def test_a_bare_task_takes_the_defaults() -> None:
    spec = parse_sim_uri("sim:touch-blue")
    assert (spec.task.colour, spec.sector.name) == ("blue", "wide-right")
    assert (spec.episodes, spec.seed) == (80, 0)


def test_third_means_the_tasks_own_third() -> None:
    assert parse_sim_uri("sim:touch-green?sector=third").sector.name == "middle"


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("sim:touch-gren", "did you mean 'touch-green'?"),
        ("sim:touch-red?episode=3", "did you mean 'episodes'?"),
        ("sim:touch-red?sector=midle", "did you mean 'middle'?"),
    ],
)
def test_an_unknown_name_offers_the_nearest(uri: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse_sim_uri(uri)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "query",
    ["episodes=0", "episodes=-1", "episodes=abc", "episodes=", "episodes=50001", "seed=-1",
     "seed=1.5", "seed=٣", "seed=1&seed=2"],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(query: str) -> None:
    with pytest.raises(ConfigError, match=query.partition("=")[0]):
        parse_sim_uri(f"sim:touch-red?{query}")


def test_another_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="no simulated dataset"):
        parse_sim_uri("hf:owner/name")


def test_the_catalogue_names_every_task() -> None:
    """The terminal, which may not load the simulation, takes the tasks from there."""
    assert list_simulated_tasks() == [task.name for task in TASKS]
