"""A LeRobotDataset v3 folder, read and checked before training.

LeRobot itself asks the hub when a file is missing, reads on without statistics, and doubles rows
when a file lies there twice. Here each of these is a DataError that names the file and the mend,
and nothing is ever asked of the hub.

Shape letters: N frames, E episodes, S state, A action dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zk0bot.errors import DataError
from zk0bot.files import read_json
from zk0bot.training.statistics import ACTION, STATE, feature_statistics, still_dimensions
from zk0bot.training.video import count_frames_from, read_frames

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
IMAGE_PREFIX = "observation.images."
FORMAT_VERSION = "v3.0"
RECORD_AGAIN = "copy the dataset again from where it was recorded"
DEFAULT_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DEFAULT_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


class Feature(BaseModel):
    """One entry of ``features`` in ``meta/info.json``."""

    model_config = ConfigDict(extra="ignore")
    dtype: str
    shape: tuple[int, ...]
    names: Any = None


class Info(BaseModel):
    """The part of ``meta/info.json`` that training needs."""

    model_config = ConfigDict(extra="ignore")
    fps: float = Field(gt=0)
    total_episodes: int = Field(ge=1)
    features: dict[str, Feature]
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
        episode_N=rows["episode_index"].to_numpy(),
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
        return Info.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{path} is incomplete: {error}", hint=RECORD_AGAIN) from error


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
    table = _read_table(path)
    if not {"task_index", "task"} <= set(table.column_names):
        raise DataError(f"{path} has no task texts", hint=RECORD_AGAIN)
    tasks = dict(zip(table["task_index"].to_pylist(), table["task"].to_pylist(), strict=True))
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
    tables = [_read_table(path) for path in paths]
    names = [name for name in tables[0].column_names if not name.startswith("stats/")]
    try:
        table = pa.concat_tables([t.select(names) for t in tables]).sort_by("episode_index")
    except (KeyError, pa.ArrowInvalid) as error:
        raise DataError(f"the files in {folder} disagree: {error}", hint=RECORD_AGAIN) from error
    if table["episode_index"].to_pylist() != list(range(info.total_episodes)):
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
    rows = pa.concat_tables([_numbered_rows(path, k) for k, path in enumerate(named)])
    rows = rows.sort_by("index")
    expected = np.repeat(np.arange(info.total_episodes), episodes["length"].to_numpy())
    found = rows["episode_index"].to_numpy()
    if not np.array_equal(rows["index"].to_numpy(), np.arange(len(expected))):
        raise DataError(
            f"{root / 'data'} holds {len(found)} rows where its episodes have {len(expected)}: "
            f"rows are doubled or missing in {_first_fault(rows, named)}",
            hint=RECORD_AGAIN,
        )
    if not np.array_equal(found, expected):
        raise DataError(f"rows in {root / 'data'} name other episodes", hint=RECORD_AGAIN)
    return rows


def _first_fault(rows: pa.Table, paths: list[Path]) -> Path:
    """The file of the first row whose number is not its place."""
    numbers = rows["index"].to_numpy()
    wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
    at = int(wrong[0]) if len(wrong) else len(numbers) - 1
    return paths[int(rows["file"][at].as_py())]


def _numbered_rows(path: Path, number: int) -> pa.Table:
    needed = ["index", "episode_index", "frame_index", "task_index", STATE, ACTION]
    table = _read_table(path)
    if missing := [name for name in needed if name not in table.column_names]:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=RECORD_AGAIN)
    places = pa.array(np.arange(table.num_rows))
    files = pa.array(np.full(table.num_rows, number))
    return table.select(needed).append_column("file", files).append_column("row", places)


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", hint=RECORD_AGAIN) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}", hint=RECORD_AGAIN) from error


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
    chunks, files = (episodes[name].to_pylist() for name in columns)
    return [
        root / pattern.format(chunk_index=chunk, file_index=file, **names)
        for chunk, file in zip(chunks, files, strict=True)
    ]


def _matrix(root: Path, rows: pa.Table, name: str) -> Floats:
    try:
        values = np.array(rows[name].to_pylist(), dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{name} in {root / 'data'} has rows of different lengths") from error
    if values.ndim != 2 or not np.isfinite(values).all():
        raise DataError(
            f"{name} in {root / 'data'} holds values that are no finite numbers",
            hint="remove the episode: lerobot-edit-dataset --operation.type delete_episodes",
        )
    return values


def _task_indices(root: Path, rows: pa.Table, numbers: Mapping[int, int]) -> Ints:
    found = rows["task_index"].to_pylist()
    unknown = sorted(set(found) - numbers.keys())
    if unknown:
        raise DataError(
            f"{root / 'meta' / 'tasks.parquet'} lacks the text of task {unknown[0]}",
            hint=RECORD_AGAIN,
        )
    return np.array([numbers[number] for number in found], dtype=np.int64)


def _read_cameras(root: Path, info: Info, episodes: pa.Table, rows: pa.Table) -> dict[str, Footage]:
    cameras = {}
    for key, feature in info.features.items():
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
    episode_N = rows["episode_index"].to_numpy()
    first_E = np.rint(episodes[f"{prefix}/from_timestamp"].to_numpy() * info.fps).astype(np.int64)
    return Footage(
        key=key,
        files=tuple(files),
        file_N=np.array([files.index(path) for path in paths])[episode_N],
        number_N=first_E[episode_N] + rows["frame_index"].to_numpy(),
        size=_size(info.features[key]),
        is_video=True,
    )


def _image_footage(root: Path, info: Info, episodes: pa.Table, rows: pa.Table, key: str) -> Footage:
    return Footage(
        key=key,
        files=tuple(_numbered_paths(root, info.data_path, episodes, "data", {})),
        file_N=rows["file"].to_numpy(),
        number_N=rows["row"].to_numpy(),
        size=_size(info.features[key]),
        is_video=False,
    )


def _size(feature: Feature) -> tuple[int, int]:
    """Height and width, whichever way round the shape is."""
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
        names = info.features[name].names
        for index in still_dimensions(feature_statistics(values)):
            joint = names[index] if isinstance(names, list) else str(index)
            found.append(f"{joint} never moves in {name}; it is not scaled up")
    return replace(recording, warnings=tuple(found))
