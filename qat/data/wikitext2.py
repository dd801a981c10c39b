"""WikiText-2 (raw), the corpus on which language models are usually compared."""

from typing import Any

from qat.data.custom import CustomData


class WikiText2(CustomData):
    """Its own three splits from the hub. A row is a line of an article, so rows are joined without an end of text."""

    ends_documents = False

    def __init__(
        self,
        *,
        path: str = "Salesforce/wikitext",
        config: str = "wikitext-2-raw-v1",
        offline: str = "error",
        explicit: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(path=path, config=config, offline=offline, explicit=explicit, **options)
