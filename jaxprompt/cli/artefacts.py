"""Commands that take a tuned prompt elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from jaxprompt.cli.options import BackboneOption, PromptArgument, at_home
from jaxprompt.cli.output import print_json
from jaxprompt.config.errors import UserError, shown


def export(
    prompt: PromptArgument,
    output: Annotated[Path, typer.Option(callback=at_home, help="a folder for the result")],
    backbone: BackboneOption = None,
) -> None:
    """Write OUTPUT/adapter for PEFT and, of a backbone that only jaxprompt knows, OUTPUT/backbone
    for transformers. Bottleneck adapters, which PEFT does not have, are written for AdapterHub.
    Prints where they are, as one JSON object.

    \b
    jaxprompt export runs/my/prompt --output exported
    """
    from jaxprompt.methods.artefact import fitted, load_prompt, save_adapterhub, save_peft
    from jaxprompt.methods.contents import ADAPTERS, DORA, NORMS, parts_in
    from jaxprompt.models.checkpoints.export import save_backbone
    from jaxprompt.models.checkpoints.hub import only_here
    from jaxprompt.models.checkpoints.load import load_backbone
    from jaxprompt.runtime import devices

    loaded = load_prompt(prompt)
    base = backbone or loaded.metadata.get("backbone", {}).get("source")
    weights = None
    if base is not None and only_here(base):
        devices.start()
        save_backbone(output / "backbone", base)
        base = str((output / "backbone").absolute())
    kinds = {part.kind for part in parts_in(loaded.layers)}
    if base is not None and (loaded.adapter_file is not None or kinds & {NORMS, DORA}):
        devices.start()
        weights = load_backbone(base)
        loaded = fitted(loaded, weights)
        kinds = {part.kind for part in parts_in(loaded.layers)}
    if kinds == {ADAPTERS} and not len(loaded.vectors):
        library = "AdapterHub"
        save_adapterhub(output / "adapter", loaded, base_model=base)
    else:
        library = "PEFT"
        save_peft(output / "adapter", loaded, base_model=base, backbone=weights)
    print_json({"adapter": str(output / "adapter"), "library": library, "backbone": base})


def merge(
    prompt: PromptArgument,
    output: Annotated[Path, typer.Option(callback=at_home, help="a folder for the model")],
    backbone: BackboneOption = None,
    dtype: Annotated[
        str, typer.Option(help="of the weights that are written: float32 or bfloat16")
    ] = "float32",
    any_backbone: Annotated[
        bool, typer.Option(help="allow other weights of the same shapes")
    ] = False,
) -> None:
    """Write a backbone with LoRA, IA3 or norms merged into its weights, and its tokenizer, as a
    plain Hugging Face model. Prints where it is, as one JSON object.

    \b
    jaxprompt merge runs/my/prompt --output merged
    """
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt import api

    merged = api.merge(prompt, output, backbone=backbone, dtype=dtype, any_backbone=any_backbone)
    print_json({"model": str(output), "backbone": merged.source})


def push(
    prompt: PromptArgument,
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME of a model repository")],
    public: Annotated[
        bool, typer.Option("--public", help="a repository that is made new is public, not private")
    ] = False,
    message: Annotated[str, typer.Option(help="of the commit")] = "Upload a soft prompt",
) -> None:
    """Upload the folder of a prompt to a model repository of the Hugging Face hub.

    A repository that is not there is made, private unless --public. The token is the one of
    HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another hub. Prints the address as JSON.

    \b
    jaxprompt push runs/my/prompt me/my-prompt
    """
    from jaxprompt.methods.artefact import load_prompt

    load_prompt(prompt)  # refuses what is no prompt
    if not prompt.is_dir():
        raise UserError(
            f"{shown(str(prompt))} is a file; give the folder of a prompt with its model card."
        )
    print_json(upload(prompt, repo_id, private=not public, message=message))


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> dict[str, str]:
    """Upload a folder to a model repository, which is made if it is not there.

    Returns:
        ``{"repository": its address, "commit": the address of the commit}``.

    Raises:
        UserError: the name is no repository's, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()  # at HF_ENDPOINT, if that is set
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message=message
        )
    except HFValidationError as error:
        raise UserError(
            f"{shown(repo_id)} is not the name of a repository ({_short(error)}); give OWNER/NAME."
        ) from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is uploaded; unset it.") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = "; set HF_TOKEN to a token that may write there, or run `hf auth login`"
        raise UserError(
            f"The hub refuses the upload to {shown(repo_id)} ({_short(error)})"
            f"{hint if status in (401, 403) else ''}."
        ) from None
    except (OSError, RuntimeError) as error:
        raise _unreachable(api.endpoint, error) from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise _unreachable(api.endpoint, error) from None
    return {"repository": str(repository), "commit": commit.commit_url}


def _unreachable(endpoint: str, error: Exception) -> UserError:
    return UserError(
        f"The upload to {endpoint} failed ({_short(error)}); check the network and HF_ENDPOINT, "
        "then run the same command again."
    )


def _short(error: Exception) -> str:
    """The error's text in a line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
