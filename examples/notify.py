"""Send a message when a run of a deployment fails or rejects samples: registered once on the Prefect server.

    python examples/notify.py nightly https://hooks.example.org/T000/B000

Any webhook that takes JSON will do (Slack, Mattermost, Teams, an own service); Prefect's other notification blocks
work the same way. Run it again to change the address; it needs the environment that `flows.deploy` has.
"""

import sys

from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger

RUN = (
    "{{ flow_run.name }}: {{ flow_run.state.name }} {{ flow_run.state.message or '' }} {{ (flow_run | ui_url) or '' }}"
)


def main(deployment: str, url: str) -> None:
    """Register the webhook, and the two automations that call it."""
    with get_client(sync_client=True) as client:
        uid = client.read_deployment_by_name(f"hhnet/{deployment}").id
        names = [f"hhnet: {deployment} {what}" for what in ("failed", "rejected samples")]
        for name in names:
            for old in client.read_automations_by_name(name):
                client.delete_automation(old.id)
    payload = {"text": "{{subject}}\n{{body}}"}
    hook = CustomWebhookNotificationBlock(name="hhnet", url=url, json_data=payload)
    block = hook.save(f"hhnet-{deployment.lower()}", overwrite=True)
    ours = {"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{uid}"}

    failed = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=ours,
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
    )
    # The table of rejects is made only where there are any.
    rejected = EventTrigger(
        match={"prefect.resource.id": "prefect.artifact.*", "prefect.resource.name": "hhnet-rejects"},
        match_related=ours,
        expect={"prefect.artifact.created"},
    )
    for name, trigger in zip(names, (failed, rejected), strict=True):
        action = SendNotification(block_document_id=block, subject=name, body=RUN)
        Automation(name=name, trigger=trigger, actions=[action]).create()


if __name__ == "__main__":
    main(*sys.argv[1:])
