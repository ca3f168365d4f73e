"""What runs in the pod `world` of the cluster tests: the web, the clients and the receiver of alerts.

Its image holds Python and nothing of these tests, so this is sent as one text and imports the standard library only.

    python -c THIS                                 serve /tmp/photos and take in alerts on port 8080
    python -c THIS ask URL                         one GET: [status, JSON]

On the tests' own machine it is the clients:

    python THIS load API PHOTOS SECONDS CLIENTS RATE   predictions until the time is up or standard input ends:
                                                       counts as JSON
"""

import collections
import http.client
import http.server
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit


def serve():
    alerts = []

    class World(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args):
            super().__init__(*args, directory="/tmp/photos")

        def log_message(self, *args):
            pass

        def do_POST(self):
            received = json.loads(self.rfile.read(int(self.headers["content-length"])))
            alerts.extend([a["labels"]["alertname"], a["status"], time.time()] for a in received["alerts"])
            self.reply({})

        def do_GET(self):
            if self.path == "/alerts":
                self.reply(alerts)
            else:
                super().do_GET()

        def reply(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    http.server.ThreadingHTTPServer(("", 8080), World).serve_forever()


def ask(url):
    try:
        with urllib.request.urlopen(url, timeout=15) as response:
            status, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
    except OSError as error:
        status, body = 0, json.dumps(str(error)).encode()
    return [status, json.loads(body)]


def load(api, photos, seconds, clients, rate):
    """Each client sends at its share of the rate; nothing is tried twice, so every failure counts."""
    host = urlsplit(api).netloc
    pictures = [path.read_bytes() for path in sorted(photos.glob("*/*.jpg"))[::7]]
    begun = time.monotonic()
    end = begun + seconds
    versions, failures, waits, lock = collections.Counter(), collections.Counter(), [], threading.Lock()

    def stop_with_stdin():
        nonlocal end
        sys.stdin.read()
        end = time.monotonic()

    def client(number):
        connection, sent = None, 0
        due = time.monotonic() + number / rate
        while (now := time.monotonic()) < end:
            if now < due:
                time.sleep(max(0, min(due - now, end - now)))
                continue
            due = max(due + clients / rate, now - 1)
            picture = pictures[(number + sent) % len(pictures)]
            body = (
                b'--x\r\ncontent-disposition: form-data; name="file"; filename="p"\r\n'
                b"content-type: image/jpeg\r\n\r\n" + picture + b"\r\n--x--\r\n"
            )
            try:
                # A new connection for each few requests, so that new pods get their share.
                if connection is None or sent % 20 == 0:
                    connection = http.client.HTTPConnection(host, timeout=30)
                connection.request("POST", "/predict", body, {"content-type": "multipart/form-data; boundary=x"})
                response = connection.getresponse()
                answer = response.read()
                if response.getheader("connection", "").lower() == "close":
                    connection = None
                with lock:
                    waits.append(time.monotonic() - now)
                    if response.status == 200:
                        versions[str(json.loads(answer)["model"]["version"])] += 1
                    else:
                        failures[f"{response.status} {json.loads(answer).get('code')}"] += 1
            except (OSError, http.client.HTTPException) as error:
                connection = None
                with lock:
                    failures[type(error).__name__] += 1
            sent += 1

    threading.Thread(target=stop_with_stdin, daemon=True).start()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits.sort()
    return {
        "answered": sum(versions.values()),
        "versions": versions,
        "failures": failures,
        "per_second": len(waits) / (time.monotonic() - begun),
        "p50": waits[len(waits) // 2] if waits else None,
        "p99": waits[int(len(waits) * 0.99)] if waits else None,
    }


if sys.argv[1:2] == ["ask"]:
    sys.stdout.write(json.dumps(ask(sys.argv[2])))
elif sys.argv[1:2] == ["load"]:
    sys.stdout.write(
        json.dumps(load(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])))
    )
else:
    serve()
