"""The catalogue for readers: facts of a mechanism, a picture of its data flow, pages.

`polyhead show`, `polyhead catalog` and the gallery of the documentation print what this room finds; what
there is to find is in the registry alone.
"""

from polyhead.gallery.facts import Facts, Size, facts_of
from polyhead.gallery.pages import pages, write_pages
from polyhead.gallery.picture import svg, text

__all__ = ["Facts", "Size", "facts_of", "pages", "svg", "text", "write_pages"]
