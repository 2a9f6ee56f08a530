"""Apache Kafka, SeaweedFS and Valkey on loopback, for a machine that has none of them."""

from infra.embedded.service import ServiceName
from infra.embedded.stack import SERVICE_NAMES, ServiceStatus, Stack

__all__ = ["SERVICE_NAMES", "ServiceName", "ServiceStatus", "Stack"]
