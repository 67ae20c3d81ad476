"""Opens the chat page in Chromium without a window, sends turns as a person would, and prints what is shown as JSON.

python browser.py ADDRESS [MODE TURN...]
"""

from __future__ import annotations

import json
import sys

from PyQt6.QtCore import QTimer
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWidgets import QApplication

SEND = """
document.getElementById("mode").value = %s;
document.getElementById("temperature").value = "0";
document.getElementById("text").value = %s;
document.getElementById("send").click();
"""
SHOWN = """
JSON.stringify({
  busy: document.getElementById("send").disabled,
  turns: [...document.querySelectorAll(".turn")].map((turn) => ({
    kind: turn.className,
    text: turn.textContent,
    total: turn.querySelector(".total")?.textContent ?? null,
    tokens: [...turn.querySelectorAll(".token")].map((token) => ({
      text: token.textContent, title: token.title, colour: token.style.background, ...token.dataset,
    })),
  })),
})
"""


class Visit:
    """One conversation on the page."""

    def __init__(self, app: QApplication, address: str, mode: str, turns: list[str]) -> None:
        self.app, self.mode, self.turns = app, mode, turns
        self.page = QWebEnginePage()
        self.page.loadFinished.connect(lambda good: self.say() if good else self.end("the page did not load"))
        self.page.load(_url(address))

    def say(self) -> None:
        if not self.turns:
            self.end("loaded")
            return
        text = self.turns.pop(0)
        self.page.runJavaScript(SEND % (json.dumps(self.mode), json.dumps(text)))
        QTimer.singleShot(100, self.look)

    def look(self) -> None:
        self.page.runJavaScript(SHOWN, self.seen)

    def seen(self, shown: str) -> None:
        if json.loads(shown)["busy"]:
            QTimer.singleShot(50, self.look)
        elif self.turns:
            self.say()
        else:
            self.end(shown)

    def end(self, answer: str) -> None:
        print(answer, flush=True)
        self.app.quit()


def _url(address: str):
    from PyQt6.QtCore import QUrl

    return QUrl(address)


def main(address: str, mode: str, turns: list[str]) -> None:
    app = QApplication([sys.argv[0]])
    visit = Visit(app, address, mode, turns)
    app.exec()
    del visit


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "", sys.argv[3:])
