"""lawnwatch: from a MySQL table of labelled image URLs to a watched image-classification service.

The modules read top to bottom as the road an image travels: catalog, store, net, images, sketch, bundle, predictions,
ingest, dataset, model, train, evaluate, registry, release, rollout, serving, pipeline, cli.
"""

__version__ = "0.1.0"
