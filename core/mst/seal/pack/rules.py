"""Which rule asks for which evidence. It is a guide for a reader, and certifies nothing.

Sources: Regulation (EU) 2016/679; 45 CFR 164.312; the Personal Information Protection Law of the
PRC, 2021; the Cybersecurity Law of the PRC, articles as numbered in 2017; GB/T 22239-2019, level 3.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Something that auditors ask for.

    Attributes:
        name: what it is called in the archive.
        says: what it shows.
        members: files of the archive that hold it; it is shown when all of them are there.
        rules: where it is asked for.
    """

    name: str
    says: str
    members: tuple[str, ...]
    rules: tuple[str, ...]


ITEMS = (
    Item(
        "record",
        "what was done, by whom, when, with which model and which data",
        ("audit/events.jsonl", "run/run.json", "run/request.json"),
        (
            "GDPR 30(1)", "HIPAA 164.312(a)(2)(i)", "HIPAA 164.312(b)", "PIPL 54",
            "Cybersecurity Law 21(3)", "GB/T 22239 8.1.4.3",
        ),
    ),
    Item(
        "integrity",
        "whether the log is whole, whether the result is what was logged, and each file's hash",
        ("audit/verification.json", "outputs.json", "files.sha256"),
        ("GDPR 32(1)(b)", "HIPAA 164.312(c)(1)", "GB/T 22239 8.1.4.7"),
    ),
    Item(
        "seal",
        "the job ran where no network could be reached, as tried from inside before it began",
        ("run/seal.json",),
        ("GDPR 32(1)(b)", "GDPR 32(1)(d)", "HIPAA 164.312(e)(1)", "PIPL 51", "GB/T 22239 8.1.4.8"),
    ),
    Item(
        "personal data",
        "how much personal data the files hold, by kind; no value of it",
        ("personal-data.json",),
        ("GDPR 30(1)(c)", "PIPL 51", "PIPL 55", "GB/T 22239 8.1.4.11"),
    ),
    Item(
        "privacy budget",
        "what differential privacy guarantees, where it was used",
        ("privacy-budget.json",),
        ("GDPR 32(1)(a)", "PIPL 51"),
    ),
    Item(
        "evaluation",
        "how the model does on rows that it was not trained on",
        ("evaluation.json",),
        ("GDPR 32(1)(d)",),
    ),
    Item(
        "bill of materials",
        "what the model was made of, with hashes and licences",
        ("sbom.cdx.json",),
        ("GB/T 22239 8.1.4.6",),
    ),
)  # fmt: skip
