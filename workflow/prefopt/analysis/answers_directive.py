"""The directive `answers` of reStructuredText, by which `workflow/report/workflow.rst` opens a report with what came out.

Snakemake renders that page when it makes a report, and not before: the directive reads the tables then. Its content are the
paths of the report's files, one a line. Names and sentences go in as text and are no markup.
"""

from __future__ import annotations

import base64
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives


class Answers(Directive):
    """A question, its answer, what takes from it, and the figure, for each table among the paths that has one."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The paragraphs and images."""
        from prefopt.analysis.answers import answers  # and pandas, which every start of Snakemake would wait for

        made: list[nodes.Node] = []
        for answer in answers(Path(line.strip()) for line in self.content if line.strip()):
            asked = nodes.strong(text=answer.question)
            made.append(nodes.paragraph("", "", asked, nodes.Text(f" {answer.sentence}")))
            made += [nodes.paragraph("", "", nodes.strong(text=caveat)) for caveat in answer.caveats]
            if answer.figure.exists():
                data = base64.b64encode(answer.figure.read_bytes()).decode()
                words = f"{answer.question} {answer.sentence}"
                made.append(nodes.image(uri=f"data:image/svg+xml;base64,{data}", alt=words, width="100%"))
            made.append(nodes.paragraph("", answer.note))
        return made


def register() -> None:
    """Makes the directive known to docutils."""
    directives.register_directive("answers", Answers)
