"""Takes a page in Chromium through steps, without a window, and prints what each of them gave as a JSON list.

python browser_steps.py ADDRESS STEPS: a JSON list of {"size": [width, height]}, {"run": script}, {"until": expression},
{"picture": file}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

PAUSE = 30
"""milliseconds between two looks"""
SETTLED = 400
"""milliseconds in which a page of a new size is laid out and painted"""


class Walk:
    """One page, and one step after the other."""

    def __init__(self, app: QApplication, address: str, steps: list[dict[str, Any]]) -> None:
        self.app, self.steps, self.given = app, steps, []
        self.view = QWebEngineView()
        self.view.resize(1000, 800)
        self.view.show()
        self.view.loadFinished.connect(lambda good: self.go_on(good) if good else self.app.exit(1))
        self.view.load(QUrl(address))

    def go_on(self, value: Any = None) -> None:
        self.given.append(value)
        if not self.steps:
            print(json.dumps(self.given[1:]), flush=True)
            self.app.quit()
            return
        ((kind, what),) = self.steps.pop(0).items()
        getattr(self, kind)(what)

    def size(self, what: list[int]) -> None:
        self.view.resize(*what)
        QTimer.singleShot(SETTLED, self.go_on)

    def run(self, script: str) -> None:
        self.view.page().runJavaScript(script, self.go_on)

    def until(self, expression: str) -> None:
        again = lambda: QTimer.singleShot(PAUSE, lambda: self.until(expression))
        self.view.page().runJavaScript(expression, lambda value: self.go_on(value) if value else again())

    def picture(self, file: str) -> None:
        QTimer.singleShot(SETTLED, lambda: self.go_on(self.view.grab().save(file)))


def main(address: str, steps: list[dict[str, Any]]) -> int:
    app = QApplication([sys.argv[0]])
    walk = Walk(app, address, steps)
    code = app.exec()
    del walk
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
