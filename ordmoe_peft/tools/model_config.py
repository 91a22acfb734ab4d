"""The configuration of a model in a folder or on the hub, and what to say where there is none."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME

from ..adapter.base_record import hub_id
from ..errors import OrdMoEModelError


def read_config(
    name: str, revision: str = "main", trust_remote_code: bool = False, instead: str = "Check the path or the id."
) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name (`str`): its folder, `config.json` or hub id. The hub is not asked for what cannot be an id.
        revision (`str`, defaults to `"main"`): branch, tag or commit on the hub.
        trust_remote_code (`bool`, defaults to `False`): run code that comes with it.
        instead (`str`): what to give, where there is no such model.

    Raises:
        [`OrdMoEModelError`]: there is none, or it cannot be read.
    """
    path = Path(name)
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        if (path / ADAPTER_CONFIG_NAME).is_file():
            instead = f"It holds an adapter: give its base as MODEL, and --adapter {name} where the command takes one."
        raise OrdMoEModelError(f"The folder {name!r} holds no model: it has no {CONFIG_NAME}. {instead}")
    if not path.exists() and hub_id(name)[0] is None:
        raise OrdMoEModelError(f"There is no folder {name!r}, and it is no hub id (owner/name). {instead}")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    # Some values are not looked at: a dtype that torch has not, a rope without its factor, a number for a mapping.
    except (OSError, ValueError, StrictDataclassError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if path.exists():
            raise OrdMoEModelError(f"The configuration of {name!r} cannot be used: {reason}. {instead}") from error
        raise OrdMoEModelError(
            f"There is no folder {name!r} here, and the hub gave no model of this id: {reason}. {instead}"
        ) from error
