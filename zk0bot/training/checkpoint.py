"""A LeRobot ``pretrained_model`` folder: what stock LeRobot loads, with card and metrics."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import TokenizerProcessorStep

from zk0bot.files import write_json, write_text
from zk0bot.training.model_folder import VLM_FOLDER
from zk0bot.training.processing import build_processors
from zk0bot.training.protocol import DatasetStatistics

PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
MOVED = """
## Loading it after a move

`config.json` and `policy_preprocessor.json` name the `vlm` folder inside this one by its full path
at the time of writing. Where the checkpoint has been moved to another place, say so:

```python
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

folder = "/where/it/lies/now"
config = PreTrainedConfig.from_pretrained(folder)
config.vlm_model_name = f"{folder}/vlm"
policy = SmolVLAPolicy.from_pretrained(folder, config=config)
preprocess, postprocess = make_pre_post_processors(
    config,
    folder,
    preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": f"{folder}/vlm"}},
)
```
"""


def save_checkpoint(
    policy: SmolVLAPolicy,
    statistics: DatasetStatistics | None,
    output_dir: Path,
    *,
    card: str,
    metrics: Mapping[str, float | int | str | None],
) -> None:
    """Write ``policy`` to ``output_dir``, which appears complete or not at all.

    An earlier checkpoint there is replaced. Without ``statistics`` nothing is normalised: who
    loads it brings those of the target. A VLM that lies on this machine is copied along.
    """
    output_dir = output_dir.absolute()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        new = workplace / "new"
        new.mkdir()
        card += _write_policy(policy, statistics, new, output_dir)
        write_text(new / "README.md", card)
        write_json(new / "metrics.json", metrics)
        if output_dir.exists():
            output_dir.rename(workplace / "old")
        new.rename(output_dir)
    finally:
        shutil.rmtree(workplace)


def _write_policy(
    policy: SmolVLAPolicy, statistics: DatasetStatistics | None, folder: Path, final: Path
) -> str:
    """Weights, configuration and processors; returns what the card has to add."""
    preprocess, postprocess = build_processors(policy, statistics)
    config, vlm = policy.config, Path(policy.config.vlm_model_name)
    is_local = vlm.is_dir()
    if is_local:
        shutil.copytree(vlm, folder / VLM_FOLDER)
        config.vlm_model_name = str(final / VLM_FOLDER)
        _name_tokenizer(preprocess, config.vlm_model_name)
    try:
        policy.save_pretrained(folder)
    finally:
        config.vlm_model_name = str(vlm)
    preprocess.save_pretrained(folder, config_filename=PREPROCESSOR)
    postprocess.save_pretrained(folder, config_filename=POSTPROCESSOR)
    return MOVED if is_local else ""


def _name_tokenizer(preprocess: Any, name: str) -> None:
    for step in preprocess.steps:
        if isinstance(step, TokenizerProcessorStep):
            step.tokenizer_name = name
