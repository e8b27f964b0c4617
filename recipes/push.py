"""Push a finished adapter or model to the Hugging Face Hub, with its card.

    cameo push outputs/lora-cat3d-tiny you/rooms-lora               # a finished run: its adapter
    cameo push outputs/lora-cat3d-tiny/adapter you/rooms-lora       # the same
    cameo push outputs/full-cat3d-tiny/model you/rooms private=true # a full model
    cameo push outputs/run/checkpoint-200 you/rooms-lora license=openrail

The files are checked first, and where the base can be loaded the output too; what was not checked is said. The card is
the README.md of the folder, with what you have written into it; the name of the repository is filled in. Nothing but
the model, its card and its pictures is uploaded. --help lists the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cameo.settings import Settings, run_recipe, setting, split_arguments, typed_values


@dataclass
class Options(Settings):
    """What is pushed, where to, and how."""

    # The folder of a finished run, of a saved adapter or of a model; and after it the repository, your-name/your-model,
    # which is created if it does not exist.
    folder_and_repository: list[str] = setting(factory=list, positional=True)
    # Token with write permission; it is never written or shown. null, the default, takes the variable HF_TOKEN or the
    # token of `hf auth login`, which no other user of the machine sees, as they see a command line.
    token: str | None = setting(None, secret=True)
    # Whether a new repository is private. null, the default, leaves it to the owner's setting.
    private: bool | None = setting(None)
    # License of the weights, an identifier of the Hub as openrail++. null, the default, takes the one on the card, else
    # that of the base weights; where none is known the push is refused.
    license: str | None = setting(None)
    # Title of the commit.
    commit_message: str = setting("Upload with cameo")
    # Whether a pull request is opened instead of changing the branch. false by default.
    create_pr: bool = setting(False)
    # Branch to write to, created if needed. null, the default, is main.
    revision: str | None = setting(None)

    def check(self) -> None:
        """Refuse what is not one folder and one repository."""
        if len(self.folder_and_repository) != 2:
            raise ValueError(
                f"expected a folder and a repository, got {len(self.folder_and_repository)} arguments; for example "
                "cameo push outputs/lora-cat3d-tiny you/rooms-lora"
            )
        if self.create_pr and self.revision is not None:
            raise ValueError("revision: a pull request is opened against the default branch; leave out one of the two")


def read(arguments: list[str]) -> Options:
    """Read the options."""
    (options,) = split_arguments(arguments, Options)
    return Options(**typed_values(Options, options))


def main(arguments: list[str]) -> None:
    """Push the folder, and say where it is and what was checked."""
    options = read(arguments)
    from cameo.hub.push_folder import push_folder

    folder, repo_id = options.folder_and_repository
    pushed = push_folder(
        folder,
        repo_id,
        token=options.token,
        private=options.private,
        license=options.license,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
        revision=options.revision,
    )
    print(f"pushed {pushed.folder} to {pushed.url}")
    if pushed.unverified is None:
        print("checked before: the uploaded files, loaded again, give the output of the saved model bit for bit")
    else:
        print(
            f"not checked: the output of the uploaded files, since {pushed.unverified}. Checked: every file is whole, "
            "and is the one in the folder"
        )


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    run_recipe(main, lambda arguments: [read(arguments)], [Options], about=__doc__ or "", arguments=arguments)


if __name__ == "__main__":
    run()
