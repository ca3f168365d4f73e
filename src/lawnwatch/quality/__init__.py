"""The quality report: what the stored images look like, and the checks they must pass.

One page per state of the catalog, kept in the store as HTML and JSON: figures from every stored image, contact sheets
from a few of them. The report is named by what it says, so that looking twice at the same images changes nothing.

Read in this order: `assess` (the step), `facts` (figures from the catalog), `noise` (labels that the champion
disputes), `checks` (facts against thresholds), `sheets` (the pictures worth a look), `page` (HTML).
"""

from lawnwatch.quality.assess import ChecksFailed, report
from lawnwatch.quality.checks import QualityResult

__all__ = ["ChecksFailed", "QualityResult", "report"]
