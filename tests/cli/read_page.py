"""A page as its tags, attributes and text."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "path", "line"}


class ReadPage(HTMLParser):
    """A page as tags, attributes and text; fails on a tag that is not closed in its place."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, wanted):
        return [attributes for tag, attributes in self.tags if tag == wanted]
