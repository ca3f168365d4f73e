"""What runs in the pod `world` of the cluster tests: the web, the clients and the receiver of alerts.

Its image holds Python and nothing of these tests, so this is sent as one text and imports the standard library only.

    python -c THIS                                 serve /tmp/photos and take in alerts on port 8080
    python -c THIS ask URL                         one GET: [status, JSON]
    python -c THIS hold API COUNT BYTES            so many bodies at once that lack their end for a second: counts

On the tests' own machine it is the clients:

    python THIS load API PHOTOS SECONDS CLIENTS RATE TRIES   predictions until the time is up or standard input ends:
                                                             counts as JSON; at rate 0 each client sends its next when
                                                             the last is answered
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


def hold(api, count, size):
    """What becomes of so many bodies of no picture, all on their way at once."""
    outcomes, lock, piece = collections.Counter(), threading.Lock(), bytes(1_000_000)
    together = threading.Barrier(count)

    def send():
        connection = http.client.HTTPConnection(urlsplit(api).netloc, timeout=60)
        try:
            connection.putrequest("POST", "/predict")
            connection.putheader("content-type", "image/jpeg")
            connection.putheader("content-length", str(size))
            connection.endheaders()
            together.wait()
            for _ in range(size // len(piece)):
                connection.send(piece)
            time.sleep(1)
            connection.send(bytes(size % len(piece)))
            response = connection.getresponse()
            outcome = f"{response.status} {json.loads(response.read()).get('code')}"
        except (OSError, http.client.HTTPException) as error:
            outcome = type(error).__name__
        with lock:
            outcomes[outcome] += 1

    threads = [threading.Thread(target=send) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def load(api, photos, seconds, clients, rate, tries):
    """Each client sends at its share of the rate; failures are of the last try, waits since it was due."""
    host = urlsplit(api).netloc
    pictures = [path.read_bytes() for path in sorted(photos.glob("*/*.jpg"))[::7]]
    begun = time.monotonic()
    end = begun + seconds
    versions, failures, retried = collections.Counter(), collections.Counter(), collections.Counter()
    waits, lock = [], threading.Lock()

    def stop_with_stdin():
        nonlocal end
        sys.stdin.read()
        end = time.monotonic()

    def client(number):
        connection, sent = None, 0
        due = time.monotonic() + (number / rate if rate else 0)
        while (now := time.monotonic()) < end:
            if now < due:
                time.sleep(max(0, min(due - now, end - now)))
                continue
            due = max(due, now - 1) if rate else now
            picture = pictures[(number + sent) % len(pictures)]
            body = (
                b'--x\r\ncontent-disposition: form-data; name="file"; filename="p"\r\n'
                b"content-type: image/jpeg\r\n\r\n" + picture + b"\r\n--x--\r\n"
            )
            for left in reversed(range(tries)):
                version = failure = None
                try:
                    # A new connection for each few requests, so that new pods get their share.
                    if connection is None or sent % 20 == 0:
                        connection = http.client.HTTPConnection(host, timeout=30)
                    connection.request("POST", "/predict", body, {"content-type": "multipart/form-data; boundary=x"})
                    response = connection.getresponse()
                    answer = json.loads(response.read())
                    if response.getheader("connection", "").lower() == "close":
                        connection = None
                    if response.status == 200:
                        version = str(answer["model"]["version"])
                    else:
                        failure = f"{response.status} {answer.get('code')}"
                except (OSError, http.client.HTTPException) as error:
                    connection, failure = None, type(error).__name__
                with lock:
                    if version is not None:
                        waits.append(time.monotonic() - due)
                        versions[version] += 1
                    else:
                        (retried if left else failures)[failure] += 1
                if version is not None:
                    break
                if left:
                    time.sleep(0.3)
            due += clients / rate if rate else 0
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
        "retried": retried,
        "per_second": len(waits) / (time.monotonic() - begun),
        "p50": waits[len(waits) // 2] if waits else None,
        "p99": waits[int(len(waits) * 0.99)] if waits else None,
    }


if sys.argv[1:2] == ["ask"]:
    sys.stdout.write(json.dumps(ask(sys.argv[2])))
elif sys.argv[1:2] == ["hold"]:
    sys.stdout.write(json.dumps(hold(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
elif sys.argv[1:2] == ["load"]:
    api, photos, seconds, clients, rate, tries = sys.argv[2:]
    sys.stdout.write(json.dumps(load(api, Path(photos), float(seconds), int(clients), float(rate), int(tries))))
else:
    serve()
