"""A LeRobotDataset v3 folder, read and checked before training.

LeRobot itself asks the hub when a file is missing, reads on without statistics, and doubles rows
when a file lies there twice. Here each of these is a DataError that names the file and the mend,
and nothing is ever asked of the hub. The folder may come from a stranger: what may lie in it, and
how large, is in ``dataset_folder``.

Shape letters: N frames, E episodes, S state, A action dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zk0bot.errors import DataError
from zk0bot.files import read_json
from zk0bot.training.dataset_folder import (
    RECORD_AGAIN,
    check_camera,
    check_template,
    read_columns,
    refuse_strays,
)
from zk0bot.training.protocol import MAX_DIMENSIONS, MAX_MAGNITUDE
from zk0bot.training.statistics import ACTION, STATE, feature_statistics, still_dimensions
from zk0bot.training.video import MAX_SIDE, count_frames_from, read_frames

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
IMAGE_PREFIX = "observation.images."
FORMAT_VERSION = "v3.0"
MAX_TASKS = 10_000
MAX_FRAMES = 20_000_000
"""Nine days at 25 frames a second."""
MAX_TOTAL_BYTES = 2**32
"""Of states, actions and numbers of all files."""
DEFAULT_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DEFAULT_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


class Feature(BaseModel):
    """One entry of ``features`` in ``meta/info.json``."""

    model_config = ConfigDict(extra="ignore")
    dtype: str
    shape: tuple[int, ...] = Field(max_length=8)
    names: Any = None


class Info(BaseModel):
    """The part of ``meta/info.json`` that training needs."""

    model_config = ConfigDict(extra="ignore")
    fps: float = Field(gt=0, le=1000)
    total_episodes: int = Field(ge=1, le=10**6)
    features: dict[str, Feature] = Field(max_length=1000)
    data_path: str = DEFAULT_DATA_PATH
    video_path: str | None = DEFAULT_VIDEO_PATH


@dataclass(frozen=True, kw_only=True)
class Footage:
    """Where a camera's N frames are."""

    key: str
    """Feature name."""
    files: tuple[Path, ...]
    file_N: Ints
    """Index into ``files``."""
    number_N: Ints
    """Number of the frame within its video file, or row within its parquet file."""
    size: tuple[int, int]
    """Height and width in pixels."""
    is_video: bool


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All frames of a dataset in order, pictures left on disk."""

    root: Path
    fps: float
    states_NS: Floats
    actions_NA: Floats
    episode_N: Ints
    task_N: Ints
    """Index into ``tasks``."""
    tasks: tuple[str, ...]
    cameras: Mapping[str, Footage]
    """By name without ``observation.images.``."""
    warnings: tuple[str, ...]

    @property
    def num_episodes(self) -> int:
        return int(self.episode_N[-1]) + 1


def read_recording(root: Path) -> Recording:
    """Read ``root`` and check all of it. Raises DataError naming the first file at fault."""
    refuse_strays(root)
    info = _read_info(root)
    _check_statistics_file(root)
    episodes = _read_episodes(root, info)
    rows = _read_rows(root, info, episodes)
    tasks = _read_tasks(root)
    numbers = {number: index for index, number in enumerate(tasks)}
    recording = Recording(
        root=root,
        fps=info.fps,
        states_NS=_matrix(root, rows, STATE),
        actions_NA=_matrix(root, rows, ACTION),
        episode_N=_integers(root / "data", rows, "episode_index"),
        task_N=_task_indices(root, rows, numbers),
        tasks=tuple(tasks.values()),
        cameras=_read_cameras(root, info, episodes, rows),
        warnings=(),
    )
    for name, footage in recording.cameras.items():
        if footage.is_video:
            _check_videos(footage, info.fps, name)
    return _with_warnings(recording, info)


def _read_info(root: Path) -> Info:
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DataError(
            f"{root} is no LeRobotDataset: {path} is missing",
            hint="give the folder that holds meta/, data/ and videos/",
        )
    value = read_json(path)
    version = value.get("codebase_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise _version_error(root, version)
    try:
        info = Info.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{path} is incomplete: {error}", hint=RECORD_AGAIN) from error
    check_template(info.data_path, path, has_video_key=False)
    check_template(info.video_path or DEFAULT_VIDEO_PATH, path, has_video_key=True)
    return info


def _version_error(root: Path, version: object) -> DataError:
    convert = (
        "python -m lerobot.scripts.convert_dataset_v21_to_v30 "
        f"--repo-id=local/{root.name} --root={root} --push-to-hub=false"
    )
    hints = {
        "v2.1": convert,
        "v2.0": f"convert it to v2.1 with lerobot 0.3, then: {convert}",
    }
    return DataError(
        f"{root} has dataset format {version!r}; {FORMAT_VERSION} is needed",
        hint=hints.get(str(version), "record it with lerobot 0.4 to 0.6, or convert it"),
    )


def _check_statistics_file(root: Path) -> None:
    path = root / "meta" / "stats.json"
    if not path.is_file():
        raise DataError(
            f"{path} is missing: LeRobot would train without normalisation", hint=RECORD_AGAIN
        )
    if not isinstance(stats := read_json(path), dict) or not {STATE, ACTION} <= stats.keys():
        raise DataError(f"{path} lacks {STATE} or {ACTION}", hint=RECORD_AGAIN)


def _read_tasks(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.parquet"
    table = read_columns(path, ("task_index", "task"))
    if not {"task_index", "task"} <= set(table.column_names):
        raise DataError(f"{path} has no task texts", hint=RECORD_AGAIN)
    if table.num_rows > MAX_TASKS:
        raise DataError(f"{path} has more than {MAX_TASKS} tasks", hint=RECORD_AGAIN)
    numbers = _integers(path, table, "task_index").tolist()
    tasks = dict(zip(numbers, table["task"].to_pylist(), strict=True))
    for number, text in tasks.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{path}: task {number} has no text",
                hint="give it one with lerobot-edit-dataset: the policy reads it as instruction",
            )
    return tasks


def _read_episodes(root: Path, info: Info) -> pa.Table:
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{folder} holds no parquet file", hint=RECORD_AGAIN)
    tables = [read_columns(path) for path in paths]
    names = tables[0].column_names
    try:
        table = pa.concat_tables([t.select(names) for t in tables]).sort_by("episode_index")
    except (KeyError, pa.ArrowInvalid) as error:
        raise DataError(f"the files in {folder} disagree: {error}", hint=RECORD_AGAIN) from error
    found = _integers(folder, table, "episode_index")
    if not np.array_equal(found, np.arange(info.total_episodes)):
        raise DataError(
            f"{folder} describes {table.num_rows} episodes, {root / 'meta' / 'info.json'} says "
            f"{info.total_episodes}: one is missing or there twice",
            hint=RECORD_AGAIN,
        )
    return table


def _read_rows(root: Path, info: Info, episodes: pa.Table) -> pa.Table:
    """The frames of all episodes in order, with ``file`` and ``row`` telling where each lies."""
    named = list(_numbered_paths(root, info.data_path, episodes, "data", {}))
    stray = sorted(set((root / "data").glob("*/*.parquet")) - set(named))
    if stray:
        raise DataError(
            f"{stray[0]} belongs to no episode: its rows would count twice", hint="remove the file"
        )
    rows = _all_rows(root, named).sort_by("index")
    lengths = _integers(root / "meta" / "episodes", episodes, "length")
    if lengths.min() < 0 or lengths.sum() > MAX_FRAMES:
        raise DataError(f"{root} claims {lengths.sum()} frames", hint=RECORD_AGAIN)
    expected = np.repeat(np.arange(info.total_episodes), lengths)
    found = _integers(root / "data", rows, "episode_index")
    if not np.array_equal(_integers(root / "data", rows, "index"), np.arange(len(expected))):
        raise DataError(
            f"{root / 'data'} holds {len(found)} rows where its episodes have {len(expected)}: "
            f"rows are doubled or missing in {_first_fault(rows, named)}",
            hint=RECORD_AGAIN,
        )
    if not np.array_equal(found, expected):
        raise DataError(f"rows in {root / 'data'} name other episodes", hint=RECORD_AGAIN)
    return rows


def _all_rows(root: Path, paths: list[Path]) -> pa.Table:
    tables: list[pa.Table] = []
    for number, path in enumerate(paths):
        tables.append(_numbered_rows(path, number))
        if sum(table.nbytes for table in tables) > MAX_TOTAL_BYTES:
            raise DataError(f"{root / 'data'} is larger than a recording can be")
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise DataError(f"the files in {root / 'data'} disagree: {error}") from error


def _first_fault(rows: pa.Table, paths: list[Path]) -> Path:
    """The file of the first row whose number is not its place."""
    numbers = rows["index"].to_numpy()
    wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
    at = int(wrong[0]) if len(wrong) else len(numbers) - 1
    return paths[int(rows["file"][at].as_py())]


def _numbered_rows(path: Path, number: int) -> pa.Table:
    needed = ["index", "episode_index", "frame_index", "task_index", STATE, ACTION]
    table = read_columns(path, needed)
    if missing := [name for name in needed if name not in table.column_names]:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=RECORD_AGAIN)
    places = pa.array(np.arange(table.num_rows))
    files = pa.array(np.full(table.num_rows, number))
    return table.select(needed).append_column("file", files).append_column("row", places)


def _numbered_paths(
    root: Path, pattern: str, episodes: pa.Table, prefix: str, names: Mapping[str, str]
) -> dict[Path, int]:
    """Each file that the episodes name, in their order, with its place."""
    paths = dict.fromkeys(_episode_paths(root, pattern, episodes, prefix, names))
    return {path: place for place, path in enumerate(paths)}


def _episode_paths(
    root: Path, pattern: str, episodes: pa.Table, prefix: str, names: Mapping[str, str]
) -> list[Path]:
    """For every episode the file that holds it."""
    columns = (f"{prefix}/chunk_index", f"{prefix}/file_index")
    if not set(columns) <= set(episodes.column_names):
        raise DataError(
            f"{root / 'meta' / 'episodes'} does not say which file of {prefix} holds an episode",
            hint=RECORD_AGAIN,
        )
    place = root / "meta" / "episodes"
    chunks, files = (_integers(place, episodes, name).tolist() for name in columns)
    return [
        root / pattern.format(chunk_index=chunk, file_index=file, **names)
        for chunk, file in zip(chunks, files, strict=True)
    ]


def _integers(where: Path, table: pa.Table, name: str) -> Ints:
    """A column of whole numbers; DataError where it holds anything else, or nothing."""
    if name not in table.column_names:
        raise DataError(f"{where} has no column {name!r}", hint=RECORD_AGAIN)
    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{where}: {name} holds more than whole numbers", hint=RECORD_AGAIN)
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _matrix(root: Path, rows: pa.Table, name: str) -> Floats:
    column = rows[name].combine_chunks()
    kind = column.type
    if not pa.types.is_list(kind) and not pa.types.is_fixed_size_list(kind):
        raise DataError(f"{name} in {root / 'data'} is no list of numbers", hint=RECORD_AGAIN)
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) != 1 or not widths[0] or widths[0] > MAX_DIMENSIONS:
        raise DataError(f"{name} in {root / 'data'} has rows of different lengths")
    flat = pc.list_flatten(column)
    if not pa.types.is_floating(flat.type) and not pa.types.is_integer(flat.type):
        raise DataError(f"{name} in {root / 'data'} is no list of numbers", hint=RECORD_AGAIN)
    with np.errstate(over="ignore"):  # refused below
        values: Floats = (
            flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, widths[0])
        )
    if not (np.abs(values) <= MAX_MAGNITUDE).all():  # false for NaN
        raise DataError(
            f"{name} in {root / 'data'} holds values that are no finite numbers",
            hint="remove the episode: lerobot-edit-dataset --operation.type delete_episodes",
        )
    return values


def _task_indices(root: Path, rows: pa.Table, numbers: Mapping[int, int]) -> Ints:
    found, place_N = np.unique(_integers(root / "data", rows, "task_index"), return_inverse=True)
    unknown = sorted(set(found.tolist()) - numbers.keys())
    if unknown:
        raise DataError(
            f"{root / 'meta' / 'tasks.parquet'} lacks the text of task {unknown[0]}",
            hint=RECORD_AGAIN,
        )
    return np.array([numbers[number] for number in found.tolist()], dtype=np.int64)[place_N]


def _read_cameras(root: Path, info: Info, episodes: pa.Table, rows: pa.Table) -> dict[str, Footage]:
    cameras = {}
    for key, feature in info.features.items():
        if feature.dtype in ("video", "image"):
            check_camera(key, root / "meta" / "info.json")
        if feature.dtype == "video":
            footage = _video_footage(root, info, episodes, rows, key)
        elif feature.dtype == "image":
            footage = _image_footage(root, info, episodes, rows, key)
        else:
            continue
        cameras[key.removeprefix(IMAGE_PREFIX)] = footage
    return cameras


def _video_footage(root: Path, info: Info, episodes: pa.Table, rows: pa.Table, key: str) -> Footage:
    pattern, prefix = info.video_path or DEFAULT_VIDEO_PATH, f"videos/{key}"
    paths = _episode_paths(root, pattern, episodes, prefix, {"video_key": key})
    files = list(dict.fromkeys(paths))
    episode_N = _integers(root / "data", rows, "episode_index")
    first_E = np.rint(_starts(root, episodes, prefix) * info.fps).astype(np.int64)
    return Footage(
        key=key,
        files=tuple(files),
        file_N=np.array([files.index(path) for path in paths])[episode_N],
        number_N=first_E[episode_N] + _integers(root / "data", rows, "frame_index"),
        size=_size(root, key, info.features[key]),
        is_video=True,
    )


def _image_footage(root: Path, info: Info, episodes: pa.Table, rows: pa.Table, key: str) -> Footage:
    return Footage(
        key=key,
        files=tuple(_numbered_paths(root, info.data_path, episodes, "data", {})),
        file_N=rows["file"].to_numpy(),
        number_N=rows["row"].to_numpy(),
        size=_size(root, key, info.features[key]),
        is_video=False,
    )


def _starts(root: Path, episodes: pa.Table, prefix: str) -> NDArray[np.float64]:
    """Second of each episode's first frame within its video."""
    name = f"{prefix}/from_timestamp"
    if name not in episodes.column_names or not pa.types.is_floating(episodes[name].type):
        raise DataError(f"{root / 'meta' / 'episodes'} lacks {name}", hint=RECORD_AGAIN)
    seconds = np.asarray(episodes[name].to_numpy(), dtype=np.float64)
    if not ((seconds >= 0) & (seconds < MAX_FRAMES)).all():
        raise DataError(f"{root / 'meta' / 'episodes'}: {name} is no time", hint=RECORD_AGAIN)
    return seconds


def _size(root: Path, key: str, feature: Feature) -> tuple[int, int]:
    """Height and width, whichever way round the shape is."""
    if len(feature.shape) != 3 or not all(1 <= side <= MAX_SIDE for side in feature.shape):
        raise DataError(
            f"{root / 'meta' / 'info.json'}: {key} has shape {feature.shape}", hint=RECORD_AGAIN
        )
    a, b, c = feature.shape
    return (b, c) if a in (1, 3) and c not in (1, 3) else (a, b)


def _check_videos(footage: Footage, fps: float, camera: str) -> None:
    """Decode the first and last frame of each file that is used."""
    for index, path in enumerate(footage.files):
        numbers = footage.number_N[footage.file_N == index]
        first, last = int(numbers.min()), int(numbers.max())
        frame = read_frames(path, [first], fps)
        if frame.shape[2:] != footage.size:
            raise DataError(
                f"video {path} is {frame.shape[3]}x{frame.shape[2]} px, meta/info.json says "
                f"{footage.size[1]}x{footage.size[0]}",
                hint=RECORD_AGAIN,
            )
        if not count_frames_from(path, last, fps):
            raise DataError(
                f"video {path} of camera {camera!r} ends before frame {last}: it is cut short",
                hint=RECORD_AGAIN,
            )


def _with_warnings(recording: Recording, info: Info) -> Recording:
    found = []
    for name, values in ((STATE, recording.states_NS), (ACTION, recording.actions_NA)):
        for index in still_dimensions(feature_statistics(values)):
            joint = _joint(info, name, index)
            found.append(f"{joint} never moves in {name}; it is not scaled up")
    return replace(recording, warnings=tuple(found))


def _joint(info: Info, feature: str, index: int) -> str:
    """What the dataset calls a dimension, where it has a printable name."""
    names = info.features[feature].names if feature in info.features else None
    name = names[index] if isinstance(names, list) and index < len(names) else None
    return name if isinstance(name, str) and name.isprintable() else str(index)
