"""``python -m dblightning search --config FILE``: the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from dblightning.extras import check_extra


def search_main(argv: Sequence[str]) -> None:
    """Parse, search, print."""
    if not any(each in ("-h", "--help") or each.startswith("--print_config") for each in argv):
        check_extra("a preference search", "optuna", "search")  # before a model is read
    from jsonargparse import ArgumentParser

    from dblightning.data.base import PromptDataModule
    from dblightning.preference_search.answer import summary
    from dblightning.preference_search.search import PreferenceSearch

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            words = message.split("\n\n")[0].split()  # the parser lists what it tried behind an empty line
            print(f"error: {' '.join(words)[:600]}", file=sys.stderr)
            sys.exit(2)

    parser = Parser(
        prog="python -m dblightning search",
        description="Search the preference (weights, w(t), λ, method) that meets a goal; answers with a preset.",
    )
    parser.add_argument("--config", action="config", help="YAML file; configs/miniature/search.yaml is an example")
    parser.add_class_arguments(PreferenceSearch, "model", skip={"data"}, instantiate=False)
    parser.add_subclass_arguments(PromptDataModule, "data", required=True)
    made = parser.instantiate_classes(parser.parse_args(list(argv)))
    search = PreferenceSearch(data=made.data, **vars(made.model))
    answer = search.run()
    print(summary(answer, search.rewards))
    print(f"preset: {search.out / 'preset.yaml'}")
