"""An encoder that goes on from an earlier one, under the same schema or one that has grown."""

from dataclasses import replace

from lirank.data.batch import Encoder
from lirank.schema.evolve import check_evolution, grown_vocabulary
from lirank.schema.features import Schema


def grown_encoder(old: Encoder, schema: Schema) -> Encoder:
    """What was learned, under a schema that may have more features and more rows.

    Numbers that were known keep their statistics, whatever is observed later, so that old scores stay as they are.

    Args:
        old: The earlier encoder; it is left as it is.
        schema: The new schema.

    Returns:
        The new encoder.

    Raises:
        ValueError: If the schema differs in anything that cannot grow.
    """
    check_evolution(old.schema, schema)
    found = Encoder(schema)
    for name, vocabulary in old.vocabularies.items():
        found.vocabularies[name] = grown_vocabulary(vocabulary, schema.feature(name))
    for name, statistics in old.statistics.items():
        found.statistics[name] = replace(statistics, sample=statistics.sample.copy())
    found.settled = frozenset(old.statistics)
    return found
